"""The family that a run file names with `model.family`: a plan takes it, and so do all trainers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from miles_core import ModelSpec
from miles_core.config.schema import ModelSection
from miles_core.plugins import Catalog, Plugin, discover, resolve
from miles_core.run.model import prepare_model
from miles_megatron import families
from miles_torch import model

OWN = "acme-models:own"


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """What is installed, and another family that covers what miles-qwen's covers."""
    module: Any = ModuleType("acme_models")
    module.describe = lambda config: SimpleNamespace(by="acme-models")
    monkeypatch.setitem(sys.modules, "acme_models", module)
    spec = ModelSpec(
        name="own",
        ref="miles_qwen.family:Qwen3",
        architectures=("Qwen3ForCausalLM",),
        backends=dict.fromkeys(("megatron", "transformers"), "acme_models:describe"),
        summary="x",
    )
    plugin = Plugin(name="acme-models", version="1", entry="acme_models", requires="", status="active", records=(spec,))
    catalog = Catalog((*discover().plugins, plugin))
    for user in (families, model):
        monkeypatch.setattr(user, "discover", lambda: catalog)
    return catalog


@pytest.mark.parametrize("chosen", [OWN, "own", "miles-qwen:qwen3"])
def test_both_trainers_describe_a_new_model_by_the_family_that_was_chosen(
    chosen: str, both: Catalog, tmp_path: Path
) -> None:
    family = resolve(both.get(ModelSpec, chosen).spec.ref)()
    section = ModelSection(
        family=chosen, config={"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}, max_tokens=64
    )
    config: Mapping[str, Any] = json.loads((prepare_model(section, family, tmp_path) / "config.json").read_text())
    by = {getattr(found, "by", "miles-qwen") for found in (families.describe(config), model.config_of(tmp_path))}
    assert by == {"miles-qwen" if chosen.startswith("miles") else "acme-models"}
