"""`miles plugins new`: what it writes is complete and keeps the rules, and what it refuses it leaves alone."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from miles_core import __version__
from miles_core.cli.plugins import new
from miles_core.declarations import declaration_kinds
from miles_core.errors import UserError
from miles_core.plugins import discover
from miles_core.scaffold import KINDS, new_plugin
from miles_core.testing.checks import cases

NEEDS_TORCH = {"callback", "correction", "engine", "loss", "model", "trainer", "weight-sync"}


def test_there_is_a_template_for_every_kind() -> None:
    assert sorted(KINDS) == sorted(kind.kind.replace(" ", "-") for kind in declaration_kinds().values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_complete(kind: str, tmp_path: Path) -> None:
    written = new_plugin("acme-new", kind, tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()) == written
    assert {str(path) for path in written} >= {
        ".github/workflows/publish.yml", ".gitignore", "README.md", "pyproject.toml", "src/acme_new/__init__.py",
        "src/acme_new/py.typed", "tests/test_acme_new.py", "tests/test_contract.py",
    }  # fmt: skip
    assert ("src/acme_new/options.py" in map(str, written)) == (
        kind not in ("command", "model", "recipe", "weight-sync")
    )
    for path in written:
        text = (tmp_path / path).read_text()
        assert "$" not in text
        if path.suffix == ".py":
            ast.parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_project_says_what_a_published_plugin_must(kind: str, tmp_path: Path) -> None:
    new_plugin("acme-new", kind, tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["keywords"] == ["miles-plugin"]
    assert project["entry-points"]["miles.plugins"] == {"acme-new": "acme_new"}
    assert project["dependencies"][0] == "miles-core>=0.1,<0.2"
    assert __version__.startswith("0.1")  # what the line above goes with
    workflow = (tmp_path / ".github/workflows/publish.yml").read_text()
    assert "id-token: write" in workflow
    assert "miles plugins check acme-new" in workflow


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_keeps_the_rules(kind: str, site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in NEEDS_TORCH:
        pytest.importorskip("torch")
    if kind in ("model", "recipe"):
        pytest.importorskip("miles_grpo")
    new_plugin("acme-new", kind, tmp_path / "acme-new")
    site.install("acme-new", requires=">=0.1,<0.2")  # its metadata; its module is the one written above
    (site.folder / "acme_new.py").unlink()
    monkeypatch.syspath_prepend(str(tmp_path / "acme-new" / "src"))
    importlib.invalidate_caches()
    found = [case.run() for case in cases(discover().plugin("acme-new"))]
    assert {f"{verdict.record} {verdict.rule}": verdict.faults for verdict in found if verdict.faults} == {}
    assert any(verdict.record and not verdict.skipped for verdict in found) or kind == "command"


def test_the_command_says_what_it_wrote_and_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(new, ["acme-new", "--kind", "reward"])
    assert done.exit_code == 0
    assert "acme-new/src/acme_new/reward.py" in done.output.splitlines()
    assert done.output.splitlines()[-1] == (
        "Next: cd acme-new && pip install -e '.[test]' && pytest && miles plugins check acme-new"
    )


def test_a_component_of_our_own_has_its_short_name(tmp_path: Path) -> None:
    new_plugin("miles-best-of", "filter", tmp_path)
    assert 'name="best-of"' in (tmp_path / "src/miles_best_of/__init__.py").read_text()


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Acme", "must begin with a letter"),
        ("acme_new", "must begin with a letter"),
        ("acme--new", "must begin with a letter"),
        ("-acme", "must begin with a letter"),
        ("9lives", "must begin with a letter"),
        ("", "must begin with a letter"),
        ("../acme", "must begin with a letter"),
        ("json", "json already means something in Python"),
        ("lambda", "lambda already means something in Python"),
        ("miles-core", r"miles-core 0\.1\.0 is installed already"),
        ("pluggy", r"pluggy .* is installed already"),
    ],
)
def test_a_name_that_is_none_or_is_taken_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        new_plugin(name, "reward", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("miles-2x", "advantage", "a plugin's advantage cannot be called '2x': nothing in Python can be called 2x"),
        ("miles-class", "loss", "a plugin's loss cannot be called 'class': nothing in Python can be called class"),
        ("none", "reward", "a plugin's reward cannot be called 'none': nothing in Python can be called None"),
        (
            "completion",
            "engine",
            "a plugin's engine cannot be called 'completion': Completion means something else in its code",
        ),
        (
            "sequence",
            "reward",
            "a plugin's reward cannot be called 'sequence': Sequence means something else in its code",
        ),
        (
            "miles-sample",
            "reward",
            "a plugin's reward cannot be called 'sample': Sample means something else in its code",
        ),
        (
            "value-error",
            "loss",
            "a plugin's loss cannot be called 'value-error': ValueError means something else in its code",
        ),
        (
            "miles-given",
            "advantage",
            "a plugin's advantage cannot be called 'given': given means something else in its code",
        ),
        (
            "miles-contract",
            "recipe",
            "a plugin's recipe cannot be called 'contract': tests/test_contract.py is for the rules",
        ),
        ("train", "command", "the command 'train' is miles-core's own; choose another name"),
        ("plugins", "command", "the command 'plugins' is miles-core's own; choose another name"),
        ("jsonl", "data-source", "the data source 'jsonl' is miles-core's own; choose another name"),
        ("miles-single-turn", "rollout", "the rollout 'single-turn' is miles-core's own; choose another name"),
    ],
)
def test_a_component_that_would_break_its_package_is_refused(
    name: str, kind: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        new_plugin(name, kind, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_of_core_in_another_kind_is_free(tmp_path: Path) -> None:
    assert new_plugin("jsonl", "filter", tmp_path / "jsonl")


def test_a_name_that_no_module_says_need_not_be_one_in_python(tmp_path: Path) -> None:
    assert new_plugin("miles-2x", "recipe", tmp_path / "2x")
    assert new_plugin("miles-class", "reward", tmp_path / "class")


def test_who_else_has_a_component_of_that_name_is_said(site: Any, tmp_path: Path) -> None:
    reward = "@hookimpl\ndef miles_rewards():\n    yield RewardSpec(name='best', ref='acme_there:R', summary='s')\n"
    site.install("acme-there", reward)
    done = site.run("plugins", "new", "miles-best", "--kind", "reward", "--folder", str(tmp_path / "new"))
    assert done.returncode == 0
    assert done.stderr.split("\n\n")[-1].strip() == (
        "Note: the reward 'best' is also acme-there's. Where both are installed, run files must say miles-best:best."
    )


def test_a_name_whose_module_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_local.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="there is a module acme_local already"):
        new_plugin("acme-local", "reward", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no kind 'rewards'\. Did you mean 'reward'"):
        new_plugin("acme-new", "rewards", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty; nothing was written"):
        new_plugin("acme-new", "reward", tmp_path)
    with pytest.raises(UserError, match="is a file"):
        new_plugin("acme-new", "reward", tmp_path / "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    assert new_plugin("acme-new", "reward", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["miles-core", "--kind", "reward"], "miles-core 0.1.0 is installed already; choose another name"),
        (["acme-there", "--kind", "reward"], "acme-there 1.0 is installed already; choose another name"),
        (["Acme_New", "--kind", "reward"], "'Acme_New' is no name for a plugin: it must begin with a letter"),
        (["../acme-new", "--kind", "reward"], "'../acme-new' is no name for a plugin: it must begin with a letter"),
        (["acme-new", "--kind", "rewards"], "there is no kind 'rewards'. Did you mean 'reward'"),
        (["acme-new", "--kind", "reward", "--folder", "acme-full"], "acme-full is not empty; nothing was written."),
        (["acme-full", "--kind", "reward"], "acme-full is not empty; nothing was written."),
        (["acme-new", "--kind", "reward", "--folder", "acme-full/mine.txt"], "acme-full/mine.txt is a file"),
        (
            ["acme-new", "--kind", "reward", "--folder", "acme-full/mine.txt/x"],
            "acme-full/mine.txt/x cannot be written",
        ),
        (["acme-new", "--kind", "reward", "--folder", "/proc/acme-new"], "/proc/acme-new cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_refuses_with_2_and_touches_nothing(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    site.install("acme-there")
    (tmp_path / "work/acme-full").mkdir(parents=True)
    (tmp_path / "work/acme-full/mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    done = site.run("plugins", "new", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {message}")
    assert "Traceback" not in done.stderr
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "site" not in path.parts}
    assert left == {"work", "work/acme-full", "work/acme-full/mine.txt"}
    assert (tmp_path / "work/acme-full/mine.txt").read_text() == "mine"


def test_the_kind_must_be_given(site: Any) -> None:
    done = site.run("plugins", "new", "acme-new")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--kind" in done.stderr
