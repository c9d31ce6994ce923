"""A run: plan, loop, collector, publishing, checkpoints."""
