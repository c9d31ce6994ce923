"""Whole runs as a person starts them: `miles train` in a process of its own, on a tiny model, with a plugin that looks
on and does what the environment variable MILES_PROBE (JSON) says.

Every process of a run carries a mark in its environment, so that the tests find what is left of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

MARK = "MILES_TEST_MARK"

PROBE = '''
"""A callback that notes and disturbs, and rewards."""

import json
import os
import resource
import signal
import time
from pathlib import Path

from miles_core import CallbackSpec, RewardSpec, hookimpl


@hookimpl
def miles_callbacks():
    yield CallbackSpec(
        name="probe", ref="miles_probe:Probe", summary="Looks on.", runs_on=frozenset({"driver", "trainer", "rollout"})
    )


@hookimpl
def miles_rewards():
    yield RewardSpec(name="even", ref="miles_probe:Even", summary="The share of even letters.")
    yield RewardSpec(name="broken", ref="miles_probe:Broken", summary="Always raises.")
    yield RewardSpec(name="patchy", ref="miles_probe:Patchy", summary="Not a number for every first sample.")


class Even:
    def __init__(self, options): ...

    def score(self, samples):
        return [sum(ord(letter) % 2 == 0 for letter in sample.text) / max(len(sample.text), 1) for sample in samples]


class Patchy(Even):
    def score(self, samples):
        scores = super().score(samples)
        return [float("nan") if sample.index == 0 else score for sample, score in zip(samples, scores)]


class Broken:
    def __init__(self, options): ...

    def score(self, samples):
        raise LookupError("no such verifier")


class Probe:
    """What MILES_PROBE says: pause: step after whose checkpoint the driver waits until it is told to go on; pause_step:
    the same after a step, before its checkpoint; raise: the hooks that raise; full_disk: step after which trainer rank
    0 cannot write large files; starts: how often the engines of these names may start; dies_meeting, dies_receiving:
    which start of an engine is one that dies when it comes to meet the trainer, or when weights arrive and there is a
    file "die"."""

    def __init__(self, options):
        self.orders = json.loads(os.environ.get("MILES_PROBE", "{}"))
        self.folder = Path(os.environ["MILES_PROBE_FOLDER"])

    def note(self, name, **values):
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({**values, "pid": os.getpid()}) + "\\n")

    def disturb(self, hook):
        if hook in self.orders.get("raise", []):
            raise ArithmeticError(f"the probe raises in {hook}")

    def run_start(self, run):
        self.disturb("run_start")

    def step_end(self, run, step, metrics):
        self.pause("pause_step", step)
        self.disturb("step_end")

    def checkpoint_saved(self, run, step, path):
        self.pause("pause", step)

    def pause(self, order, step):
        if self.orders.get(order) == step:
            self.note("paused", step=step)
            while not (self.folder / f"go on after {step}").exists():
                time.sleep(0.05)

    def run_failed(self, run, error):
        self.note("ended", hook="run_failed", error=str(error))
        self.disturb("run_failed")

    def run_end(self, run):
        self.note("ended", hook="run_end")

    def model_built(self, context):
        self.note("members", role=f"trainer {context.rank}")

    def before_train_step(self, context, step, batch):
        if context.rank == 0:
            self.note("trained", step=step, groups=sorted(set(batch.samples["group"].tolist())))
        self.disturb("before_train_step")

    def after_train_step(self, context, step):
        if context.rank == 0 and self.orders.get("full_disk") == step + 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def engine_started(self, context):
        role = f"engine {context.index}"
        self.note("members", role=role)
        starts = (self.folder / "members.jsonl").read_text().count(role)
        if starts > self.orders.get("starts", {}).get(role, starts):
            raise ArithmeticError(f"the probe does not let {role} start")
        for order, method in (("dies_meeting", "connect"), ("dies_receiving", "receive")):
            if self.orders.get(order, {}).get(role) == starts:
                self.die_in(method)

    def die_in(self, method):
        from miles_torch.sync import TorchReceiver

        real, order = getattr(TorchReceiver, method), self.folder / "die"

        def die(receiver, *args):
            if method == "connect" or order.exists():
                order.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(receiver, *args)

        setattr(TorchReceiver, method, die)
'''

MODEL = """
[model]
family = "qwen3"
tokenizer = "ascii"
max_tokens = 40
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
tie_word_embeddings = true
"""

RUN = (
    """
callbacks = ["probe"]
[data]
name = "jsonl"
path = "data.jsonl"
holdout = 0.2
[reward]
name = "even"
[sampling]
max_new_tokens = 8
[engine]
name = "torch"
[trainer]
name = "torch"
[trainer.optimizer]
learning_rate = 3e-3
[advantage]
name = "grpo"
[loss]
name = "grpo"
[schedule]
steps = 4
prompts_per_step = 4
samples_per_prompt = 2
"""
    + MODEL
)
"""A run file: synchronous, one engine, one trainer rank."""


@dataclass
class Miles:
    """A folder to start runs in. `start` and `run` call `miles` there. patience_s: how long a run, or what is waited
    for in one, may take."""

    folder: Path
    patience_s: float = 240.0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        site = self.folder / "site"
        info = site / "miles_probe-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: miles-probe\nVersion: 1.0\nRequires-Dist: miles-core"
        )
        (info / "entry_points.txt").write_text("[miles.plugins]\nprobe = miles_probe\n")
        (site / "miles_probe.py").write_text(PROBE)
        rows = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(40)]
        (self.folder / "data.jsonl").write_text("\n".join(rows) + "\n")
        (self.folder / "run.toml").write_text(RUN)

    def start(
        self, *args: str, probe: Mapping[str, Any] | None = None, cwd: Path | None = None, background: bool = False
    ) -> subprocess.Popen[str]:
        """`miles ARGS`, in a process group of its own, as a shell would start it: a script's background job ignores
        Ctrl-C."""
        code = "import sys; from miles_core.cli.main import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", code, *args],
            cwd=cwd or self.folder,
            env={**self.environment(probe or {}), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL),
        )

    def environment(self, probe: Mapping[str, Any]) -> dict[str, str]:
        """In which the probe is installed and has its orders."""
        path = os.pathsep.join(filter(None, [str(self.folder / "site"), os.environ.get("PYTHONPATH")]))
        own = {"MILES_PROBE": json.dumps(probe), "MILES_PROBE_FOLDER": str(self.folder)}
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **own}

    def run(self, *args: str, probe: Mapping[str, Any] | None = None, cwd: Path | None = None) -> Ended:
        """`miles ARGS`, to its end."""
        return self.end(self.start(*args, probe=probe, cwd=cwd))

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end, and for that of all other processes of the run."""
        try:
            out, err = process.communicate(timeout=self.patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = process.communicate()
            raise AssertionError(f"the run hangs\n{out}\n{err}") from None
        return Ended(process.returncode, out, err, self.left_over())

    def pids(self) -> dict[int, str]:
        """The processes that carry the mark, with their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                marked = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marked and command:  # a zombie has none
                found[int(entry.name)] = command
        return found

    def left_over(self) -> list[str]:
        """What is still there some seconds after the end."""
        try:
            wait_for(lambda: not self.pids(), "the end of all processes", 10.0)
        except AssertionError:
            return list(self.pids().values())
        return []

    def kill(self) -> None:
        """kill -9 of everything."""
        while found := self.pids():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def notes(self, name: str) -> list[dict[str, Any]]:
        """What the probe has noted."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_note(self, name: str, process: subprocess.Popen[str], **values: Any) -> dict[str, Any]:
        """Until the probe has noted this."""

        def noted() -> dict[str, Any] | None:
            if process.poll() is not None:
                raise AssertionError(f"the run has ended: {process.communicate()}")
            return next((note for note in self.notes(name) if values.items() <= note.items()), None)

        found: dict[str, Any] = wait_for(noted, f"{name} {values}", self.patience_s)
        return found

    def go_on(self, step: int) -> None:
        """Ends the pauses of this step."""
        (self.folder / f"go on after {step}").touch()

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Ended:
    """How a command ended. left_over: processes that outlived it."""

    code: int
    out: str
    err: str
    left_over: list[str]


def wait_for(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """What `condition` gives once it is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def apart_from_times(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what the clock says."""

    def timeless(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in line.items():
            if name not in ("time", "tokens_per_second") and not name.startswith("seconds/"):
                yield name, value

    return [dict(timeless(line)) for line in lines]
