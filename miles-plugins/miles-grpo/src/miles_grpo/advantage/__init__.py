"""Advantages: pure numpy functions of `AdvantageInputs`."""
