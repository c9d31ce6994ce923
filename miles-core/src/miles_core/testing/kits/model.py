"""Rules of a model family: a tiny model of it goes through transformers, and through a trainer and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from miles_core.plugins import Entry, discover, options_of, resolve
from miles_core.sample import Batch
from miles_core.specs import ModelSpec, TrainerSpec
from miles_core.testing.fakes import make_batch
from miles_core.testing.kits.training import training_stage, weight_faults
from miles_core.testing.models import TINY, batch_logprobs, randomised, save_model, trainer_context, weights_of
from miles_core.testing.subject import Subject, skip

TOLERANCE = 2e-5
"""Of a log-probability, in float32 on a CPU, where sums in another order are up to 4e-6 apart."""


def completes_a_config(subject: Subject[ModelSpec]) -> Iterator[str]:
    """A few fields become a config.json of one of its architectures, unchanged when completed again."""
    config = _config(subject)
    if not set(config.get("architectures", ())) & set(subject.spec.architectures):
        yield f"the config says {config.get('architectures')}, and the record {subject.spec.architectures}"
    for name, value in _tiny(subject).items():
        if config.get(name) != value:
            yield f"{name} was given as {value!r} and became {config.get(name)!r}"


def refuses_unknown_fields(subject: Subject[ModelSpec]) -> Iterator[str]:
    """A misspelt field of config.json is a `ValueError` that names it."""
    try:
        subject.target().fresh({**_tiny(subject), "hidden_sise": 8})
    except ValueError as error:
        if "hidden_sise" not in str(error):
            yield f"the error does not name the field: {error}"
        return
    yield "it accepts the field hidden_sise"


def is_known_to_transformers(subject: Subject[ModelSpec]) -> Iterator[str]:
    """transformers makes the model of its config, with as many parameters as the family counts."""
    family, config = subject.target(), _config(subject)
    model = _model(subject)
    if type(model).__name__ not in subject.spec.architectures:
        yield f"transformers makes a {type(model).__name__} of its config"
    count = sum(parameter.numel() for parameter in model.parameters())
    if family.parameters(config) != count:
        yield f"it counts {family.parameters(config)} parameters, and there are {count}"


def comes_back_from_a_trainer(subject: Subject[ModelSpec]) -> Iterator[str]:
    """Hugging Face folder → trainer → Hugging Face folder: the same tensors bit for bit, each once."""
    model = _model(subject)
    trainer = _trainer(subject, _saved(subject, model))
    names = [name for part in trainer.layout() for name in part.names]
    trainer.save_pretrained(subject.folder / "policy")
    trainer.stop()
    yield from (f"{name} is mapped {names.count(name)} times" for name in set(names) if names.count(name) > 1)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(subject.folder / "policy", dtype=model.dtype)
    yield from weight_faults(weights_of(model), weights_of(again))


def has_the_logprobs_of_transformers(subject: Subject[ModelSpec]) -> Iterator[str]:
    """In a trainer, log-probabilities of a packed batch are transformers' own for each sample alone."""
    import torch

    model, batch = _model(subject), _batch(_config(subject)["vocab_size"])
    trainer = _trainer(subject, _saved(subject, model))
    column = trainer.logprobs(batch, "policy", 0)
    trainer.stop()
    with torch.no_grad():
        expected = batch_logprobs(model, batch).numpy()
    apart = float(np.abs(column - expected).max())
    if apart > TOLERANCE:
        yield f"a log-probability differs by {apart:.3g}"


# ---- Helpers --------------------------------------------------------------------------------------------------------


def _tiny(subject: Subject[ModelSpec]) -> dict[str, Any]:
    """What makes a model of the family tiny: the example's config over the usual fields; None takes a field out."""
    fields = {**TINY, **subject.example.config}
    return {name: value for name, value in fields.items() if value is not None or name.endswith("_token_id")}


def _config(subject: Subject[ModelSpec]) -> dict[str, Any]:
    config: dict[str, Any] = subject.target().fresh(_tiny(subject))
    return config


def _model(subject: Subject[ModelSpec]) -> Any:
    """By transformers, which the family tells how if it describes itself for it."""
    import torch
    from transformers import AutoConfig

    config = _config(subject)
    if "transformers" in subject.spec.backends:
        made = resolve(subject.spec.backends["transformers"])(config)
    else:
        made = AutoConfig.for_model(**config)
    return randomised(made, torch.Generator().manual_seed(3))


def _saved(subject: Subject[ModelSpec], model: Any) -> Path:
    """A Hugging Face folder of it, with the family's config.json."""
    folder = save_model(model, subject.folder / "model")
    (folder / "config.json").write_text(json.dumps(_config(subject)), "utf-8")
    return folder


def _trainer(subject: Subject[ModelSpec], folder: Path) -> Any:
    """A trainer of the installed ones that takes any architecture and runs on a CPU, with the model loaded."""
    entry = _installed_trainer()
    options_class = options_of(entry.spec)
    options = options_class() if options_class else None
    trainer = resolve(entry.spec.ref)(options, trainer_context(folder, 0))
    trainer.start()
    trainer.begin(training_stage(options))
    return trainer


def _installed_trainer() -> Entry[TrainerSpec]:
    entries = discover().all(TrainerSpec)
    found = [entry for entry in entries if "cpu" in entry.spec.devices and entry.spec.families == "any"]
    return found[0] if found else skip("no trainer that runs on a CPU is installed; miles-torch is one")


def _batch(vocabulary: int) -> Batch:
    batch = make_batch()
    return batch.with_columns(tokens=(batch["tokens"] % vocabulary).astype(np.int32))


RULES = (
    completes_a_config,
    refuses_unknown_fields,
    is_known_to_transformers,
    comes_back_from_a_trainer,
    has_the_logprobs_of_transformers,
)
