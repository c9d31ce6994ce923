from miles_core.testing import contract_tests

test_contract = contract_tests("acme-gated-moe")
