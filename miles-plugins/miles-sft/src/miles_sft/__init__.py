"""Miles plugin: sft."""
