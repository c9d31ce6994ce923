"""What a run shows: a line a step with where its time went; live on a terminal, plain lines when piped.

rich is imported here, so this module only by commands that draw.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console as Rich
from rich.table import Table
from rich.text import Text

from miles_core.config.schema import Plan, Stage
from miles_core.run.trackers import read_metrics

LINE_EVERY_S = 1.0
"""Steps that are quicker than this share a line."""
_PARTS = (
    ("generate", "cyan"),
    ("reward", "magenta"),
    ("teacher", "green"),
    ("train", "blue"),
    ("turns", "red"),
    ("publish", "yellow"),
    ("other", "white"),
)
_BAR = 20


class Console:
    """Prints to standard output."""

    def __init__(self, plan: Plan) -> None:
        self._rich = Rich(highlight=False, soft_wrap=True)
        self._plan = plan
        self._last_line = 0.0
        self._stage: str | None = None
        self._started = time.monotonic()
        self.evaluations: list[tuple[int, Mapping[str, float]]] = []

    @property
    def live(self) -> bool:
        """Whether somebody watches."""
        return self._rich.is_terminal

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        self._rich.print(Text(text, style=style))

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Shows what takes its time; leaves nothing behind."""
        if not self.live:
            yield
            return
        with self._rich.status(Text(f"{what} …", style="dim"), spinner="dots"):
            yield

    def start(self, resumed: int | None) -> None:
        """The head of a run."""
        plan = self._plan
        engines = f", {plan.engine_section.count} engine(s)" if plan.engine_section else ""
        critics = (
            f", {count} critic rank(s)" if plan.critic_section and (count := plan.critic_section.world_size) else ""
        )
        ranks = f"{plan.trainer_section.world_size} trainer rank(s){critics}"
        self.say(f"run {plan.name}: {plan.steps} steps, {ranks}{engines}")
        since = f", resumed at step {resumed}" if resumed is not None else ""
        self.evaluations = [line for line in read_metrics(plan.folder) if "eval/reward" in line[1]]
        self.say(f"folder {_short(plan.folder)}{since}", "dim")

    def step(self, step: int, stage: Stage, metrics: Mapping[str, float]) -> None:
        """A line of a step, at most one every `LINE_EVERY_S`, and for the last one of a stage."""
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY_S and step not in (stage.first_step + 1, stage.last_step):
            return
        self._last_line = now
        if stage.name != self._stage:
            self._stage = stage.name
            heading = Text(f"── {stage.name} {'─' * 8}  steps {stage.first_step + 1}–{stage.last_step}", "bold")
            self._rich.print(Text("  ").join([heading, *self._legend(metrics)]))
        self._rich.print(Text("  ").join([*self._cells(step, metrics), *self._time(metrics)]))

    def _cells(self, step: int, metrics: Mapping[str, float]) -> list[Text]:
        shown = (
            ("reward", "reward", ".3f"),
            ("loss", "loss", ".4f"),
            ("critic/value_loss", "value loss", ".4f"),
            ("kl", "kl", ".4f"),
            ("teacher_kl", "teacher kl", ".4f"),
            ("mismatch/logprob_abs", "mismatch", ".1e"),
            ("tokens_per_second", "tok/s", ",.0f"),
        )
        width = len(str(self._plan.steps))
        cells = [Text(f"step {step:>{width}}/{self._plan.steps}", "bold")]
        cells += [Text(f"{label} {metrics[name]:{form}}") for name, label, form in shown if _has(metrics, name)]
        return cells

    def _legend(self, metrics: Mapping[str, float]) -> list[Text]:
        """What the colours of the bars mean."""
        known = [(name, colour) for name, colour in _PARTS if self.live and f"seconds/{name}" in metrics]
        return [Text(f"█ {name}", colour) for name, colour in known]

    def _time(self, metrics: Mapping[str, float]) -> list[Text]:
        total = metrics["seconds/step"]
        text = Text(f"{total:.2f} s")
        if not self.live:
            shares = ", ".join(
                f"{name} {metrics[f'seconds/{name}'] / max(total, 1e-9):.0%}"
                for name, _ in _PARTS
                if metrics.get(f"seconds/{name}", 0.0) > 0
            )
            return [text, Text(f"({shares})")]
        bar = Text()
        for name, colour in _PARTS:
            cells = round(_BAR * metrics.get(f"seconds/{name}", 0.0) / max(total, 1e-9))
            bar.append("█" * cells, colour)
        return [text, bar]

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of an evaluation."""
        self.evaluations.append((step, metrics))
        parts = "  ".join(f"{name[5:]} {value:.3f}" for name, value in metrics.items() if _shown(name))
        self.say(f"held-out after step {step}: {parts}", "green")

    def finish(self) -> None:
        """The table at the end."""
        seconds = time.monotonic() - self._started
        if self.evaluations:
            table = Table(title="held-out evaluation", title_justify="left", box=None, pad_edge=False)
            for name in ("after step", "stage", "reward", "response length", "truncated"):
                table.add_column(name, justify="left" if name == "stage" else "right")
            for step, metrics in self.evaluations:
                table.add_row(str(step), self._stage_before(step), *_row(metrics))
            self._rich.print(table)
        self.say(f"done in {seconds:.0f} s: {_short(self._plan.folder)}", "bold")
        for name, what in (("curves.png", "curves"), ("metrics.jsonl", "metrics"), ("policy", "policy")):
            if (self._plan.folder / name).exists():
                self.say(f"  {what}: {_short(self._plan.folder / name)}", "dim")

    def _stage_before(self, step: int) -> str:
        return "(start)" if step == 0 else self._plan.stage_of(step - 1).name


def _row(metrics: Mapping[str, float]) -> tuple[str, str, str]:
    return (
        f"{metrics['eval/reward']:.3f}",
        f"{metrics['eval/response_length']:.1f}",
        f"{metrics['eval/truncated']:.1%}",
    )


def _shown(name: str) -> bool:
    return name in ("eval/reward", "eval/response_length", "eval/truncated")


def _has(metrics: Mapping[str, float], name: str) -> bool:
    return name in metrics and math.isfinite(metrics[name])


def _short(path: Path) -> str:
    """A path as one would type it here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
