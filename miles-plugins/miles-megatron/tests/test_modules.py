"""What a model is made of: modules of a family's own (docs/examples/acme-gated-moe has some, with tests of their
numbers), and options, which make no other model than config.json describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_kit import config_of, make_batch, make_model, make_trainer

from miles_core.errors import UserError
from miles_megatron import families, surface
from miles_megatron.layout import check_run
from miles_megatron.options import TrainerOptions
from miles_megatron.packing import Cut, MicroBatch, pieces, row
from miles_qwen.megatron import qwen3


@pytest.mark.parametrize("where", ["modules", "layers"])
def test_a_place_that_there_is_not_is_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    wrong = {"mlp.ruter": "torch.nn:Identity"}
    changed = {"modules": wrong} if where == "modules" else {"layers": {2: wrong}}
    model = dataclasses.replace(qwen3(config_of("qwen3")), **changed)
    monkeypatch.setattr(families, "describe", lambda config: model)
    with pytest.raises(UserError, match=r"has no place 'mlp\.ruter'"):
        make_trainer(folder)


def test_no_option_makes_another_model_unnoticed(tmp_path: Path) -> None:
    # Each switch turned over, and each size that may be left out said: refused, or the numbers are the same.
    trainer = make_trainer(make_model(tmp_path / "model", "qwen3-moe", num_hidden_layers=2))
    from megatron.core.transformer import MLATransformerConfig

    defaults = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
    expected, changed, taken = logits(trainer, {}), [], 0
    for name, field in surface.fields("transformer").items():
        known = {"bool": not defaults[name], "Optional[int]": 1, "Optional[float]": 0.5}
        if field.annotation not in known:
            continue
        try:
            found = logits(trainer, {name: known[field.annotation]})
        except Exception:  # whoever refuses it, it is not unnoticed
            continue
        taken += 1
        if not torch.allclose(found, expected, rtol=0, atol=1e-4):
            changed.append(name)
    trainer.stop()
    assert changed == []
    assert taken > 20


def logits(trainer: Any, transformer: dict[str, Any]) -> torch.Tensor:
    """Of a batch by the trainer's model, built again with further options."""
    from miles_megatron import model, settings
    from miles_megatron.weights import Folder, Table, load

    described = trainer._model
    options = TrainerOptions(transformer=transformer)
    check_run(options, {}, described, 1)
    chunks = model.build(settings.transformer(options, described, 1), described, torch.device("cpu"))
    folder = Folder(trainer.context.model)
    load(chunks, Table(described, folder.names), folder)
    batch = make_batch()
    indices = row(batch, MicroBatch(tuple(pieces(batch, range(len(batch)), Cut()))), Cut())
    with torch.no_grad():
        out: torch.Tensor = chunks[0].eval()(
            input_ids=torch.from_numpy(indices.tokens)[None],
            position_ids=torch.from_numpy(indices.positions)[None],
            attention_mask=None,
            packed_seq_params=trainer._passes._packed(indices),
        )
    return out
