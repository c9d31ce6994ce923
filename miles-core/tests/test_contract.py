from __future__ import annotations

import pytest

from miles_core.plugins import discover
from miles_core.testing import checks, contract_tests

test_contract = contract_tests("miles-core")


def test_options_that_accept_any_key_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    core = discover(disable=["*"]).plugin("miles-core")
    assert list(checks.options_fit_run_files(core)) == []
    monkeypatch.setattr("miles_core.config.build.build", lambda cls, table, at: None)
    faults = list(checks.options_fit_run_files(core))
    assert "the key no-such-option, which is none of its options, is not refused" in str(faults)
