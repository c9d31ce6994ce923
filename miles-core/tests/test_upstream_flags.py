"""Flags after `--`: who gets them, as what, and what is said of those that nobody can get."""

from __future__ import annotations

import argparse
import enum
import sys
import types
from typing import Any

import pytest

from miles_core import EngineSpec, TrainerSpec
from miles_core.config.layers import read_run
from miles_core.config.source import dotted
from miles_core.errors import MissingExtraError, UserError
from miles_core.flags import Flag, from_parser
from miles_core.plugins import Catalog, Plugin

MODULE = "acme_flags"


class Backend(enum.Enum):
    flash = 1


def trainer_flags() -> dict[str, Flag]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("-tp", "--tensor-size", type=int, choices=[1, 2, 4])
    parser.add_argument("--no-fusion", action="store_false", dest="fusion")
    parser.add_argument("--backend", type=Backend.__getitem__)
    parser.add_argument("--parts", nargs="+")
    parser.add_argument("--offset", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--seed", type=int)

    def place(action: argparse.Action) -> Any:
        return "say seed" if action.dest == "seed" else [("parallel", action.dest), ("copy", action.dest)]

    return from_parser(parser, place)


def engine_flags() -> dict[str, Flag]:
    return {
        name: Flag(places=(("server", name.removeprefix("--")),), read=lambda words: words[0])
        for name in ("--dtype", "--seed", "--memory")
    }


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    module: Any = types.ModuleType(MODULE)
    module.trainer_flags, module.engine_flags = trainer_flags, engine_flags
    monkeypatch.setitem(sys.modules, MODULE, module)
    ref = f"{MODULE}:nothing"
    records = (
        TrainerSpec(name="big", ref=ref, summary="s", flags=f"{MODULE}:trainer_flags"),
        EngineSpec(name="fast", ref=ref, summary="s", flags=f"{MODULE}:engine_flags"),
        TrainerSpec(name="plain", ref=ref, summary="s"),
        EngineSpec(name="plain", ref=ref, summary="s"),
    )
    return Catalog((Plugin(name="acme", version="1", entry="acme", requires="", status="active", records=records),))


RUN = 'engine = "fast"\n[trainer]\nname = "big"\nparallel = { tensor_size = 1 }\n'


def read(tmp_path: Any, catalog: Catalog, *words: str, run: str = RUN) -> dict[str, tuple[Any, str]]:
    """Every value, with its origin."""
    (tmp_path / "run.toml").write_text(run)
    source = read_run(str(tmp_path / "run.toml"), words, catalog)
    return {dotted(path): (node.plain(), node.origin) for path, node in source.doc.leaves()}


def test_a_flag_sets_its_options_over_everything_else(tmp_path: Any, catalog: Catalog) -> None:
    found = read(tmp_path, catalog, "trainer.parallel.tensor_size=4", "--tensor-size", "2", "--memory=0.8")
    assert found["trainer.parallel.tensor_size"] == (2, "flag --tensor-size 2")
    assert found["trainer.copy.tensor_size"] == (2, "flag --tensor-size 2")
    assert found["engine.server.memory"] == ("0.8", "flag --memory 0.8")
    assert found["engine.name"][0] == "fast"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--no-fusion"], "fusion", False),
        (["--backend", "flash"], "backend", "flash"),
        (["--parts", "a", "b"], "parts", ["a", "b"]),
        (["--offset", "-3"], "offset", -3),
        (["--tensor-size", "2", "--tensor-size", "4"], "tensor_size", 4),
    ],
)
def test_words_are_read_as_the_parser_reads_them(
    tmp_path: Any, catalog: Catalog, words: list[str], name: str, value: Any
) -> None:
    assert read(tmp_path, catalog, *words)[f"trainer.parallel.{name}"][0] == value


def test_a_flag_that_one_refuses_goes_to_the_other(tmp_path: Any, catalog: Catalog) -> None:
    assert read(tmp_path, catalog, "--seed", "3")["engine.server.seed"][0] == "3"


@pytest.mark.parametrize(
    ("run", "words", "error"),
    [
        (RUN, ["--tensor-sise"], "neither trainer 'big' nor engine 'fast' has a flag --tensor-sise. Did you mean --t"),
        (RUN, ["--tensor-size", "3"], "flag --tensor-size 3: invalid choice: 3"),
        (RUN, ["--tensor-size"], "flag --tensor-size: expected one argument"),
        (RUN, ["--no-fusion", "x=1"], "unrecognized arguments: x=1"),
        (
            RUN, ["--dtype", "half"],
            "--dtype is a flag of trainer 'big' and of engine 'fast'; before --, say trainer.parallel.dtype=… or eng",
        ),
        (RUN.replace('"fast"', '"plain"'), ["--seed", "3"], "--seed cannot be set. trainer 'big': say seed"),
        (RUN.replace('"fast"', '"plain"'), ["--memory", "1"], "trainer 'big' has no flag --memory."),
        ('trainer = "plain"', ["--memory", "1"], "neither the trainer nor the engine of this run takes flags after --"),
        (RUN, ["-tp", "2"], "'-tp' after -- is no flag; flags there begin with two dashes"),
        ('trainer = "bug"', ["--memory", "1"], r"run.toml:1: trainer: unknown trainer 'bug'. Did you mean 'big'"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_refused(tmp_path: Any, catalog: Catalog, run: str, words: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        read(tmp_path, catalog, *words, run=run)


def test_flags_of_one_that_is_not_installed_are_asked_for_only_if_nobody_else_has_them(
    tmp_path: Any, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> dict[str, Flag]:
        raise MissingExtraError("pip install acme")

    monkeypatch.setattr(sys.modules[MODULE], "engine_flags", absent)
    assert read(tmp_path, catalog, "--tensor-size", "2")["trainer.parallel.tensor_size"][0] == 2
    for words in (["--memory", "0.8"], ["--seed", "3"]):  # one that nobody else has, and one that the other refuses
        with pytest.raises(UserError, match=f"flag {words[0]} .*: pip install acme"):
            read(tmp_path, catalog, *words)


def test_flags_are_not_looked_at_unless_there_are_some(tmp_path: Any, catalog: Catalog) -> None:
    del sys.modules[MODULE]
    read(tmp_path, catalog)
