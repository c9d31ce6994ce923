"""What the tests of trackers share: runs to be tracked, readers of what was written, and quiet upstreams."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Nothing here may look for a network.
os.environ.update(WANDB_ERROR_REPORTING="false", MLFLOW_DISABLE_TELEMETRY="true")
