"""Corrections: pure functions of `CorrectionInputs`; T counts trained tokens."""
