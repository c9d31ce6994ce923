"""Miles plugin: rewards."""
