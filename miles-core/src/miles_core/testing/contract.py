"""The rules of `miles plugins check` as tests of pytest."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from miles_core.plugins import discover
from miles_core.testing.checks import Case, cases


def contract_tests(plugin: str) -> Callable[[Case], None]:
    """A test function with one case a rule, for the plugin of the distribution `plugin`.

    Raises `UserError` if no such plugin is installed. A rule that cannot be tried here is skipped with its reason.
    """
    import pytest

    found = cases(discover().plugin(plugin))

    @pytest.mark.parametrize("case", found, ids=_id)
    def test_contract(case: Case) -> None:
        verdict = case.run()
        if verdict.skipped:
            pytest.skip(verdict.skipped)
        if verdict.faults:
            pytest.fail("\n".join(verdict.faults), pytrace=False)
        if verdict.warnings:
            warnings.warn("\n".join(verdict.warnings), DeprecationWarning, stacklevel=1)

    return test_contract


def _id(case: Case) -> str:
    return f"{case.record}-{case.rule}".strip("-").replace(" ", "-")
