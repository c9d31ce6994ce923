"""`miles models`, with a family and a folder of the tests' own."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import miles_core.plugins
from miles_core import ModelSpec
from miles_core.cli.models import models
from miles_core.errors import UserError
from miles_core.plugins import Catalog, Plugin
from miles_core.run import tokenizers


class Family:
    def parameters(self, config: Mapping[str, Any]) -> int:
        return int(config["hidden_size"]) * 1000


def describe(config: Mapping[str, Any]) -> str:
    if config["hidden_size"] > 5:
        raise ValueError("hidden_size is too much for it")
    return "a description"


@pytest.fixture(autouse=True)
def catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_family")
    module.Family, module.describe = Family, describe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_family", module)
    spec = ModelSpec(
        name="tiny",
        ref="fake_family:Family",
        summary="A tiny family.",
        architectures=("TinyForCausalLM",),
        backends={"iron": "fake_family:describe"},
    )
    plugin = Plugin(name="fake-models", version="1.0", entry="fake", requires="", status="active", records=(spec,))
    monkeypatch.setattr(miles_core.plugins, "discover", lambda **_: Catalog((plugin,)))


def run(*args: str) -> str:
    result = CliRunner().invoke(models, args, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def folder(tmp_path: Path, **config: Any) -> str:
    model = tmp_path / "model"
    tokenizers.make_tokenizer("bytes", model)
    (model / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"], **config}))
    return str(model)


def test_families_are_listed_with_what_they_are_described_for() -> None:
    assert run("list").splitlines()[1].split() == ["tiny", "fake-models", "iron", "TinyForCausalLM"]


def test_a_family_is_shown() -> None:
    assert "tiny: A tiny family." in run("info", "tiny")


def test_a_model_is_shown_with_its_parameters_and_who_can_train_it(tmp_path: Path) -> None:
    able = run("info", folder(tmp_path, hidden_size=5, num_hidden_layers=3))
    assert ["parameters", "5,000"] in [line.split() for line in able.splitlines()]
    assert ["iron", "can", "be", "described"] in [line.split() for line in able.splitlines()]
    assert "refused: hidden_size is too much for it" in run("info", folder(tmp_path, hidden_size=6))


def test_a_model_that_no_family_covers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        run("info", folder(tmp_path, hidden_size=5, architectures=["OddForCausalLM"], model_type="odd"))
    assert str(refused.value) == (
        "no installed model family covers OddForCausalLM (model_type 'odd'). Installed: tiny (TinyForCausalLM). "
        "To write one: docs/how-to/write-a-model-family.md"
    )


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'tinny' is neither a model family nor a folder\. Did you mean 'tiny'"):
        run("info", "tinny")
