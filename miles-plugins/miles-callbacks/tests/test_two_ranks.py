"""Both callbacks on two gloo ranks: they decide alike, and the numbers are those of one rank."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from callback_kit import STEPS, batch_of, make_trainer

from miles_callbacks import options
from miles_callbacks.aux_loss import AuxLossProbe
from miles_callbacks.nan_guard import NanGuard


def test_two_ranks_report_what_one_does(tmp_path: Path) -> None:
    callbacks = [NanGuard(options.NanGuard()), AuxLossProbe(options.AuxLossProbe(coefficient=0.5))]
    alone = make_trainer(tmp_path, callbacks)
    expected = [alone.update(batch_of(**marks), step, 1) for step, marks in enumerate(STEPS)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    script = Path(__file__).with_name("callback_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    for (out, err), rank in zip(outputs, ranks, strict=True):
        assert rank.returncode == 0, err
        for step, report in enumerate(json.loads(out.splitlines()[-1])):
            assert report.get("skipped_steps") == expected[step].get("skipped_steps") == (1.0 if STEPS[step] else None)
            if not STEPS[step]:
                assert report["aux_loss/z"] == pytest.approx(expected[step]["aux_loss/z"], rel=1e-5)
                assert report["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-5)
    assert "sample 1/0" in outputs[0][1]  # the first rank says it, wherever the sample was
    assert "that of sample 2/1 alone is not finite either" in outputs[0][1]
    assert "nan-guard" not in outputs[1][1]
