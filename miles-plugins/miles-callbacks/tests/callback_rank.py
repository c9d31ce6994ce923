"""One of two trainer ranks with both callbacks: prints what its steps reported, as JSON.

python callback_rank.py MODEL_FOLDER RANK ADDRESS
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from callback_kit import STEPS, batch_of, make_trainer

from miles_callbacks import options
from miles_callbacks.aux_loss import AuxLossProbe
from miles_callbacks.nan_guard import NanGuard


def main() -> None:
    """Takes good steps and bad ones in turn, a sample at a time: one rank has a sample more than the other."""
    logging.basicConfig()
    folder, rank, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    callbacks = [NanGuard(options.NanGuard()), AuxLossProbe(options.AuxLossProbe(coefficient=0.5))]
    trainer = make_trainer(folder, callbacks, rank=rank, world_size=2, address=address, micro_batch_tokens=1)
    reports = [trainer.update(batch_of(**marks), step, 1) for step, marks in enumerate(STEPS)]
    print(json.dumps(reports))
    trainer.stop()


if __name__ == "__main__":
    main()
