"""The picture of the tracker `curves`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from miles_core.roles import RunInfo

Rows = dict[int, dict[str, float]]
"""Step -> what was logged for it."""
Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps, and the finite values of one metric."""

INK, SOFT, FAINT, GRID = "#1f2933", "#52606d", "#8a96a3", "#e6e9ed"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6db5", "#d9822b", "#3d8f6a", "#8466a8", "#c5ccd4"
SHADE = "#f4f6f9"
PARTS = {"generate": BLUE, "reward": ORANGE, "train": GREEN, "publish": PURPLE, "other": GREY}
"""Where the time of a step goes, from the bottom up."""
DISTANCES = {
    "kl": ("KL to reference", ORANGE),
    "mismatch/logprob_abs": ("|Δ log p| to engine", BLUE),
    "mismatch/kl": ("KL to engine", PURPLE),
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 22,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": GREY,
    "xtick.labelcolor": SOFT,
    "ytick.color": GREY,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True)
class Span:
    """A stage's steps: from `first` up to `last`."""

    name: str
    first: int
    last: int


def draw(rows: Rows, run: RunInfo, path: Path, smoothing: float) -> None:
    """Writes the picture of all that was logged, whole or not at all."""
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.22, h_pad=0.16, wspace=0.04, hspace=0.05, rect=(0, 0, 1, 0.91))
        figure = Figure(figsize=(11, 7.6), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(2, 2)
        _header(figure, rows, run)
        _reward(panels[0, 0], rows, smoothing)
        _held_out(panels[0, 1], rows)
        _distances(panels[1, 0], rows, smoothing)
        _seconds(panels[1, 1], rows)
        for panel in panels.flat:
            _steps(panel, rows, stages_of(run.config))
        for panel in panels[0]:
            _stage_names(panel, rows, stages_of(run.config))
        for panel in panels[1]:
            panel.set_xlabel("step", loc="right", fontsize=10.5)
        part = path.with_suffix(".part.png")
        figure.savefig(part, dpi=160)
        part.replace(path)


# ---- Numbers -----------------------------------------------------------------------------------------------------


def stages_of(config: Mapping[str, Any]) -> list[Span]:
    """The stages of a resolved run file; none if it is not divided."""
    spans: list[Span] = []
    for stage in config.get("stages", ()):
        first = spans[-1].last if spans else 0
        spans.append(Span(stage["name"], first, first + stage["schedule"]["steps"]))
    return spans


def series(rows: Rows, name: str) -> Series:
    """The finite values of one metric, by step."""
    found = [(step, rows[step][name]) for step in sorted(rows) if np.isfinite(rows[step].get(name, np.nan))]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def smoothed(values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """Exponential moving average with weights that look back `span` values on average; unbiased at the start."""
    keep, total, weight = 1 - 1 / span, 0.0, 0.0
    result = np.empty(len(values))
    for place, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[place] = total / weight
    return result


def shares(rows: Rows) -> dict[str, float]:
    """The fraction of the time that each part took, of all that was logged."""
    totals = {part: float(series(rows, f"seconds/{part}")[1].sum()) for part in PARTS}
    whole = sum(totals.values())
    return {part: total / whole for part, total in totals.items()} if whole else {}


# ---- Panels ------------------------------------------------------------------------------------------------------


def _header(figure: Figure, rows: Rows, run: RunInfo) -> None:
    figure.text(0.012, 0.972, run.name, fontsize=17, fontweight="bold", va="center")
    facts = [f"{max(rows)} of {run.steps} steps"]
    seconds = series(rows, "seconds/step")[1].sum()
    if seconds:
        facts.append(_duration(float(seconds)))
    speed = series(rows, "tokens_per_second")[1]
    if len(speed):
        facts.append(f"{np.median(speed):,.0f} tokens/s")
    held_out = series(rows, "eval/reward")[1]
    if len(held_out) > 1:
        facts.append(f"held-out {_shown(held_out[0], held_out)} → {_shown(held_out[-1], held_out)}")
    figure.text(0.012, 0.93, "   ·   ".join(facts), fontsize=11, color=SOFT, va="center")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _steps(panel: Axes, rows: Rows, stages: Sequence[Span]) -> None:
    """The same steps in all panels, every other stage shaded."""
    last = max(max(rows), 1)
    panel.set_xlim(-0.01 * last, 1.01 * last)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.tick_params(axis="x", length=3)
    for place, stage in enumerate(stages):
        if place % 2 == 0 and len(stages) > 1:
            panel.axvspan(stage.first - 0.01 * last * (place == 0), stage.last, color=SHADE, zorder=-2, linewidth=0)


def _stage_names(panel: Axes, rows: Rows, stages: Sequence[Span]) -> None:
    for stage in stages:
        if stage.first < max(rows) and len(stages) > 1:
            panel.annotate(
                stage.name,
                (stage.first, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, 4),
                textcoords="offset points",
                fontsize=10,
                color=FAINT,
            )


def _is_fraction(values: NDArray[np.float64]) -> bool:
    return bool(len(values)) and values.min() >= 0 and values.max() <= 1


def _shown(value: float, values: NDArray[np.float64]) -> str:
    return f"{value:.0%}" if _is_fraction(values) else f"{value:.2f}"


def _scale(panel: Axes, values: NDArray[np.float64]) -> None:
    """0 to 100 % for what is a fraction."""
    if _is_fraction(values):
        panel.set_ylim(0, 1.03)
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5))


def _reward(panel: Axes, rows: Rows, smoothing: float) -> None:
    panel.set_title("Training reward")
    steps, values = series(rows, "reward")
    if not len(steps):
        return _nothing(panel)
    panel.plot(steps, values, color=BLUE, alpha=0.28, linewidth=1.1)
    panel.plot(steps, smoothed(values, smoothing), color=BLUE)
    _scale(panel, values)
    return None


def _held_out(panel: Axes, rows: Rows) -> None:
    panel.set_title("Held-out reward")
    steps, values = series(rows, "eval/reward")
    if not len(steps):
        return _nothing(panel)
    panel.plot(
        steps,
        values,
        color=GREEN,
        marker="o",
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=1.3,
        clip_on=False,
    )
    _scale(panel, values)
    for place, offset, align in ((0, (12, 0), "left"), (len(steps) - 1, (0, -20), "right")):
        panel.annotate(
            _shown(values[place], values),
            (float(steps[place]), float(values[place])),
            xytext=offset,
            textcoords="offset points",
            ha=align,
            fontsize=12,
            fontweight="bold",
            color=GREEN,
        )
    return None


def _distances(panel: Axes, rows: Rows, smoothing: float) -> None:
    """On a logarithmic scale, for they lie orders of magnitude apart."""
    panel.set_title("Policy against reference and engine")
    found = {name: _nonzero(series(rows, name)) for name in DISTANCES}
    everything = np.concatenate([values for _, values in found.values()])
    if not len(everything):
        return _nothing(panel)
    panel.set_yscale("log")
    panel.set_ylim(everything.min() / 2, everything.max() * 2)
    drawn = {name: line for name, line in found.items() if len(line[0])}
    for name, (steps, values) in drawn.items():
        label, colour = DISTANCES[name]
        panel.plot(steps, values, color=colour, alpha=0.22, linewidth=1.0)
        panel.plot(steps, np.exp(smoothed(np.log(values), smoothing)), color=colour, label=label)
    panel.yaxis.set_major_locator(LogLocator(numticks=7))
    panel.yaxis.set_minor_locator(NullLocator())
    _legend(panel, [DISTANCES[name][1] for name in drawn])
    return None


def _nonzero(line: Series) -> Series:
    steps, values = line
    return steps[values != 0], np.abs(values[values != 0])


def _seconds(panel: Axes, rows: Rows) -> None:
    panel.set_title("Seconds per step")
    share = shares(rows)
    if not share:
        return _nothing(panel)
    steps = np.array([step for step in sorted(rows) if any(f"seconds/{part}" in rows[step] for part in PARTS)])
    heights = [np.array([rows[step].get(f"seconds/{part}", 0.0) for step in steps]) for part in PARTS]
    panel.stackplot(
        steps,
        np.nan_to_num(heights),
        colors=list(PARTS.values()),
        labels=[f"{part} {share[part]:.0%}" for part in PARTS],
        linewidth=0,
        alpha=0.88,
    )
    total = np.nan_to_num(heights).sum(axis=0)
    panel.set_ylim(0, max(float(np.percentile(total, 97)) * 1.15, 1e-9))  # the first step's start-up may stick out
    panel.yaxis.set_major_locator(MaxNLocator(5))
    _legend(panel, [SOFT if colour == GREY else colour for colour in PARTS.values()])
    return None


def _legend(panel: Axes, colours: Sequence[str]) -> None:
    """Words in the colours of what they name, in one line between title and panel, where they hide nothing."""
    legend = panel.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.985),
        ncols=len(colours),
        prop={"weight": "bold", "size": 9.4},
        frameon=False,
        handlelength=0,
        handletextpad=0,
        columnspacing=0.8,
        borderaxespad=0,
    )
    legend.set_in_layout(False)
    for text, colour in zip(legend.get_texts(), colours, strict=True):
        text.set_color(colour)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_visible(False)


def _nothing(panel: Axes) -> None:
    panel.text(0.5, 0.5, "nothing logged", transform=panel.transAxes, ha="center", va="center", color=FAINT)
    panel.yaxis.set_major_locator(NullLocator())
    panel.yaxis.set_minor_locator(NullLocator())
