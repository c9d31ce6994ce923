"""Miles plugin: qwen."""
