"""Miles plugin: llama."""
