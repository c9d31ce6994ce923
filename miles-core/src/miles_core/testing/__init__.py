"""For authors of plugins: contract tests, the rules behind them, and fakes. Nothing heavy is imported with it.

A whole test file of a plugin:

    from miles_core.testing import contract_tests

    test_contract = contract_tests("acme-reward")
"""

from miles_core.testing.contract import contract_tests
from miles_core.testing.subject import Example, SkippedError, Subject, skip

__all__ = ["Example", "SkippedError", "Subject", "contract_tests", "skip"]
