"""One of two trainer ranks with both callbacks: prints what its steps reported, as JSON.

python callback_rank.py MODEL_FOLDER RANK ADDRESS
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from callback_kit import batch_of, make_trainer

from miles_callbacks import options
from miles_callbacks.aux_loss import AuxLossProbe
from miles_callbacks.nan_guard import NanGuard


def main() -> None:
    """Two good steps with a bad one between them, a sample at a time: one rank has a sample more than the other."""
    logging.basicConfig()
    folder, rank, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    callbacks = [NanGuard(options.NanGuard()), AuxLossProbe(options.AuxLossProbe(coefficient=0.5))]
    trainer = make_trainer(folder, callbacks, rank=rank, world_size=2, address=address, micro_batch_tokens=1)
    reports = [trainer.update(batch_of(bad=[4] if step == 1 else []), step, 1) for step in range(3)]
    print(json.dumps(reports))
    trainer.stop()


if __name__ == "__main__":
    main()
