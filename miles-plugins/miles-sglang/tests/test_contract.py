from miles_core.testing import contract_tests

test_contract = contract_tests("miles-sglang")
