"""Run files: TOML and overrides become frozen dataclasses, each value with its origin."""
