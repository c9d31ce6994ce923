"""Modules of a family's own in Megatron's model; docs/examples/acme-gated-moe has some, with tests of their numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from megatron_kit import config_of, make_model, make_trainer

from miles_core.errors import UserError
from miles_megatron import families
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
