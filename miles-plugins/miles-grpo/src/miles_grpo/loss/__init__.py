"""Losses: pure functions of `LossInputs`; T counts trained tokens."""
