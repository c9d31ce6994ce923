"""The Kimi family: its sizes, and how its folders are told from DeepSeek's, whose architecture they name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_core.config.model import family_of
from miles_core.plugins import discover
from miles_deepseek.family import DeepseekV3
from miles_kimi.backends import megatron
from miles_kimi.family import KimiK2


def test_kimi_k2_has_its_1026_billion_parameters() -> None:
    assert round(KimiK2().parameters({}) / 1e9) == 1026


@pytest.mark.parametrize(("family", "name"), [(KimiK2(), "kimi-k2"), (DeepseekV3(), "deepseek-v3")])
def test_the_model_type_tells_the_families_apart(family: Any, name: str) -> None:
    config = family.fresh({})
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    entry = family_of(config, discover())
    assert entry is not None
    assert entry.spec.name == name


def test_without_its_plugin_it_is_a_deepseek_v3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_DISABLE_PLUGINS", "miles-kimi")
    entry = family_of(KimiK2().fresh({}), discover())
    assert entry is not None
    assert entry.spec.name == "deepseek-v3"


def test_it_has_one_group_of_experts_and_stretched_positions() -> None:
    model = megatron({})
    assert model.transformer["moe_router_num_groups"] is None
    assert (model.transformer["rope_type"], model.transformer["rotary_scaling_factor"]) == ("yarn", 32.0)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_group \(7\) must divide n_routed_experts \(384\)"):
        KimiK2().fresh({"n_group": 7})


def test_a_folder_is_read_without_its_own_code(tmp_path: Path) -> None:
    """A released folder names code beside it, which is not run, and not even there."""
    from miles_torch.model import config_of

    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "config.json").write_text(json.dumps({**KimiK2().fresh({"num_hidden_layers": 2}), **code}))
    config = config_of(tmp_path)
    assert (type(config).__name__, config.num_hidden_layers, config.n_routed_experts) == ("DeepseekV3Config", 2, 384)
    assert config.rope_parameters["factor"] == 32.0


def test_neither_plugin_nor_family_imports_torch() -> None:
    script = (
        "import sys, miles_kimi, miles_kimi.backends;"
        "assert not {'torch', 'transformers'} & {*sys.modules}, {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
