"""How to try trackers that would go to a server by default."""

from __future__ import annotations

from pathlib import Path

from miles_core.testing import Example


def wandb(folder: Path) -> Example:
    """Without a network, and without the process that watches the machine."""
    return Example(options={"mode": "offline", "settings": {"silent": True, "x_disable_stats": True}})


def mlflow(folder: Path) -> Example:
    """With a database file."""
    return Example(options={"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}"})
