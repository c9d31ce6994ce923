"""A hook that will go: who implements it, or an argument of it, is told by `miles plugins list` and `check`."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from miles_core.hooks import DeclarationHooks, DriverHooks, hookspec
from miles_core.lifecycle import lifecycle
from miles_core.plugins import discover
from miles_core.testing import contract_tests
from miles_core.testing.checks import cases

GOING = "miles_filters goes with Miles 0.3; implement miles_sieves instead"
METRICS = "the argument metrics of step_end goes with Miles 0.3; take report instead"

FILTER = "@hookimpl\ndef miles_filters():\n    yield FilterSpec(name='one', ref='acme_part:Part', summary='s')\n"
CALLBACK = (
    "@hookimpl\ndef miles_callbacks():\n"
    "    yield CallbackSpec(name='two', ref='acme_part:Back', summary='s', runs_on=frozenset({'driver'}))\n"
)
PART = """
class Part:
    def __init__(self, options): ...
    def keep(self, group):
        return True

class Back:
    def __init__(self, options): ...
    def step_end(self, step, metrics): ...
"""
MARK = f"""
from miles_core.hooks import *
hookspec(warn_on_impl=DeprecationWarning({GOING!r}))(DeclarationHooks.miles_filters)
hookspec(warn_on_impl_args={{"metrics": DeprecationWarning({METRICS!r})}})(DriverHooks.step_end)
"""


@pytest.fixture
def deprecated(site: Any) -> Any:
    """Two plugins, one of which uses what a later release of Miles will have marked."""
    site.install("acme-old", FILTER + CALLBACK, acme_part=PART)
    fresh = CALLBACK.replace("'two'", "'three'").replace("acme_part", "acme_fresh")
    site.install("acme-new", fresh, acme_fresh=PART.replace("step, metrics", "step"))
    return site


def test_list_says_so_in_its_line(deprecated: Any) -> None:
    lines = {line.split()[0]: line for line in deprecated.run("plugins", "list", first=MARK).stdout.splitlines()}
    assert " active " in lines["acme-old"]
    assert lines["acme-old"].endswith(f"filter one; callback two  [deprecated: {GOING}]")
    assert "deprecated" not in lines["acme-new"]
    assert "deprecated" not in deprecated.run("plugins", "list").stdout
    (entry,) = (
        entry
        for entry in json.loads(deprecated.run("plugins", "list", "--json", first=MARK).stdout)
        if entry["plugin"] == "acme-old"
    )
    assert entry["faults"] == [f"deprecated: {GOING}"]


def test_check_says_so_of_hooks_and_of_their_arguments_and_lets_it_pass(deprecated: Any) -> None:
    done = deprecated.run("plugins", "check", "acme-old", first=MARK)
    assert done.returncode == 0, done.stdout
    assert f"  warn  uses nothing deprecated\n        {GOING}\n        {METRICS}\n" in done.stdout
    assert done.stderr == ""
    assert "  ok    uses nothing deprecated\n" in deprecated.run("plugins", "check", "acme-new", first=MARK).stdout


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process."""
    hooks: tuple[Any, ...] = (DeclarationHooks.miles_filters, DriverHooks.step_end)
    for hook in hooks:
        monkeypatch.setattr(hook, "miles_spec", hook.miles_spec)
    hookspec(warn_on_impl=DeprecationWarning(GOING))(DeclarationHooks.miles_filters)
    hookspec(warn_on_impl_args={"metrics": DeprecationWarning(METRICS)})(DriverHooks.step_end)


@pytest.mark.usefixtures("marked")
def test_it_works_as_before_even_where_warnings_are_errors(deprecated: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert discover().plugin("acme-old").status == "active"
        heard: list[int] = []
        old = type("Old", (), {"step_end": lambda self, step, metrics: heard.append(step)})
        lifecycle("driver", [old()]).step_end(run=None, step=3, metrics={})
    assert heard == [3]


@pytest.mark.usefixtures("marked")
def test_contract_tests_pass_with_a_warning(deprecated: Any) -> None:
    (case,) = (case for case in cases(discover().plugin("acme-old")) if case.rule == "uses_nothing_deprecated")
    assert case.run().warnings == (GOING, METRICS)
    with pytest.warns(DeprecationWarning, match="implement miles_sieves instead"):
        contract_tests("acme-old")(case)
