"""Miles plugin: torch."""
