"""The tutorial that trains on arithmetic, and the pages that go on from what it leaves: see test_commands.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import ROOT, Workshop, first, pages

from miles_core.run.trackers import read_metrics

# The first page of a chain pays for the runs of those before it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorials" / "arithmetic.md"
PAGES = [page for page in pages() if first(page) == TUTORIAL]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_print_what_is_shown(page: Path, workshop: Workshop) -> None:
    workshop.check(page)


def test_every_metric_that_a_run_reports_is_explained(workshop: Workshop) -> None:
    text = (DOCS / "how-to" / "read-the-metrics.md").read_text()
    explained = set(re.findall(r"`([^`\s]+)`", text))
    runs = [TUTORIAL, DOCS / "how-to" / "train-asynchronously.md"]
    folders = [path.parent for page in runs for path in workshop.left_by(page).rglob("metrics.jsonl")]
    assert {folder.name for folder in folders} >= {"rehearsal", "sums", "async"}
    reported = {name for folder in folders for _, metrics in read_metrics(folder) for name in metrics}
    parts = re.compile(r"(?<=reward/)[\w-]+$")
    assert {parts.sub("NAME", name) for name in reported} <= explained


def test_a_run_folder_has_what_the_reference_says(workshop: Workshop) -> None:
    text = (DOCS / "reference" / "run-folder.md").read_text()
    told = {name.partition("/")[0] for name in re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)}
    run = workshop.left_by(TUTORIAL) / "first" / "runs" / "rehearsal"
    assert told == {path.name for path in run.iterdir() if path.name != ".lock"}
    checkpoint = re.search(r"^\| `checkpoints/.*$", text, re.MULTILINE)
    assert checkpoint is not None
    inside = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", checkpoint[0])[1:]}
    assert inside == {path.name for path in next((run / "checkpoints").iterdir()).iterdir()}
