"""Fakes and contract tests for plugin authors."""
