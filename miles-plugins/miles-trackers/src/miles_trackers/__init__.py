"""Miles plugin: trackers."""
