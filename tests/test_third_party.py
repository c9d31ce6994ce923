"""The plugin of docs/examples, as somebody outside would write, install and use it.

`nox -s package` installs its wheel and those of Miles into an environment that has nothing else, says where that is
(MILES_WHEELS), and calls these tests; elsewhere only the first one runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from miles_core.scaffold import new_plugin

NAME = "acme-suffix-reward"
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / NAME
NOT_ITS_OWN = {"__pycache__", "dist", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
WRITTEN_BY_HAND = {
    "README.md", "pyproject.toml", "run.toml", "sums.jsonl", "src/acme_suffix_reward/__init__.py",
    "src/acme_suffix_reward/options.py", "src/acme_suffix_reward/reward.py", "tests/test_acme_suffix_reward.py",
}  # fmt: skip


def files(folder: Path) -> Mapping[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not NOT_ITS_OWN & {*path.parts})
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_it_is_what_plugins_new_writes_with_another_reward(tmp_path: Path) -> None:
    new_plugin(NAME, "reward", tmp_path)
    new, example = files(tmp_path), files(EXAMPLE)
    assert example.keys() - new.keys() == {"run.toml", "sums.jsonl"}
    assert {name for name, text in example.items() if new.get(name) != text} == WRITTEN_BY_HAND
    summary = "Miles plugin: 1 if the response ends with the reference answer"
    assert new["pyproject.toml"] == example["pyproject.toml"].replace(", less if it has it elsewhere.", ".")
    assert summary in new["pyproject.toml"]


@pytest.fixture(scope="module")
def wheels() -> Path:
    """The programs of an environment that has only wheels."""
    folder = os.environ.get("MILES_WHEELS")
    if folder is None:
        pytest.skip("needs an environment that has only wheels: nox -s package")
    return Path(folder) / "bin"


def call(program: Path, *arguments: str, cwd: Path) -> str:
    """What it prints, in an environment that could not find anything of this repository."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MILES", "VIRTUAL"))
    }
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=290, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_comes_from_wheels(wheels: Path, tmp_path: Path) -> None:
    code = "import acme_suffix_reward, miles_core, miles_grpo; print(*(acme_suffix_reward, miles_core, miles_grpo))"
    out = call(wheels / "python", "-I", "-c", code, cwd=tmp_path)
    assert out.count(f"{wheels.parent}/lib/") == 3
    assert str(ROOT / "miles-core") not in out


def test_it_is_listed_and_keeps_the_rules(wheels: Path, tmp_path: Path) -> None:
    (line,) = (line for line in call(wheels / "miles", "plugins", "list", cwd=tmp_path).splitlines() if NAME in line)
    assert line.split() == [NAME, "0.1.0", "<0.2,>=0.1", "active", "reward", NAME]
    checked = call(wheels / "miles", "plugins", "check", NAME, cwd=tmp_path)
    assert f"ok    reward {NAME}: 4 of 4 rules kept" in checked


def test_a_run_uses_it(wheels: Path, tmp_path: Path) -> None:
    for name in ("run.toml", "sums.jsonl"):
        shutil.copy(EXAMPLE / name, tmp_path)
    call(wheels / "miles", "train", "run.toml", "sampling.max_new_tokens=24", cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert [NAME, "0.1.0", "acme_suffix_reward"] in manifest["plugins"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    rewards = [line[f"reward/{NAME}"] for line in metrics]
    assert all(0 <= reward <= 1 for reward in rewards)
    assert max(rewards) > 0, "in 48 answers of 24 random characters, a digit that is right is there somewhere"
    assert not any(line["failed"] for line in metrics)
