"""Miles plugin: grpo."""
