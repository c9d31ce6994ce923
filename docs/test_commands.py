"""Every command that a page shows is run, and prints what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import Outcome, Workshop, blocks, matches, rewritten

from miles_core.run.trackers import read_metrics

pytestmark = pytest.mark.timeout(1800)  # the first page of a chain pays for the runs of those before it

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in sorted((*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("miles-*/**/README.md")))
    if "examples" not in page.parts and any(block.language in ("console", "bash") for block in blocks(page.read_text()))
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("pages"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_print_what_is_shown(page: Path, workshop: Workshop) -> None:
    faults = [outcome.fault for outcome in workshop.outcomes(page) if outcome.fault]
    mend = f"python docs/tools/commands.py {page.relative_to(ROOT)} writes what is printed into the page"
    assert not faults, "\n\n".join([*faults, mend])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_not_run_says_who_runs_it_or_why_not(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language in ("console", "bash") and not block.run:
            reason = block.note.removeprefix("not run: ")
            for name in re.findall(r"[\w./-]+\.py", reason):
                assert (ROOT / name).is_file(), f"{page} says that {name} runs it"


@pytest.mark.slow
def test_every_metric_that_a_run_reports_is_explained(workshop: Workshop) -> None:
    text = (DOCS / "how-to" / "read-the-metrics.md").read_text()
    explained = set(re.findall(r"`([^`\s]+)`", text))
    runs = [DOCS / "tutorials" / "arithmetic.md", DOCS / "how-to" / "train-asynchronously.md"]
    folders = [path.parent for page in runs for path in workshop.left_by(page).rglob("metrics.jsonl")]
    assert {folder.name for folder in folders} >= {"rehearsal", "sums", "async"}
    reported = {name for folder in folders for _, metrics in read_metrics(folder) for name in metrics}
    parts = re.compile(r"(?<=reward/)[\w-]+$")
    assert {parts.sub("NAME", name) for name in reported} <= explained


@pytest.mark.slow
def test_a_run_folder_has_what_the_reference_says(workshop: Workshop) -> None:
    text = (DOCS / "reference" / "run-folder.md").read_text()
    told = {name.partition("/")[0] for name in re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)}
    run = workshop.left_by(DOCS / "tutorials" / "arithmetic.md") / "first" / "runs" / "rehearsal"
    assert told == {path.name for path in run.iterdir() if path.name != ".lock"}
    checkpoint = re.search(r"^\| `checkpoints/.*$", text, re.MULTILINE)
    assert checkpoint is not None
    inside = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", checkpoint[0])[1:]}
    assert inside == {path.name for path in next((run / "checkpoints").iterdir()).iterdir()}


# ---- What the comparison allows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a"], ["a", "b"], False),
        (["a", "…"], ["a", "b", "c"], True),
        (["…", "c"], ["a", "b", "c"], True),
        (["…", "b"], ["a", "b", "c"], False),
        (["a … c"], ["a b c"], True),
        (["a … c"], ["a b d"], False),
        (["x  1"], ["x      1"], True),
        (["done in 2 s"], ["done in 104.5 s"], True),
        (["done in 2 s: runs/a"], ["done in 2 s: runs/b"], False),
        (["miles 0.1.0"], ["miles 0.2.0+cpu"], True),
        (["step 1/6  loss 4.6"], ["step 1/6  loss 5.0  tok/s 7"], True),
        (["step 1/6  loss 4.6"], ["step 2/6  loss 4.6"], False),
        (["loss.clip_high 0.2"], ["loss.clip_high 0.3"], False),
        ([], ["a"], False),
    ],
)
def test_an_ellipsis_and_what_varies_stand_for_other_text(shown: list[str], printed: list[str], same: bool) -> None:
    assert matches(shown, printed) is same


PAGE = """
<!-- exits with 2 -->
```console
$ false
> true
old
```
- in a list:

    ```toml title="a/b.toml"
    x = 1
    ```

<!-- not run: it is slow -->
```bash
sleep 9
```
"""


def test_blocks_are_read_with_their_notes_titles_and_lines() -> None:
    first, second, third = blocks(PAGE)
    assert (list(first.commands()), first.code, first.run) == ([("false\ntrue", ["old"])], 2, True)
    assert (second.title, second.text, second.run) == ("a/b.toml", "x = 1\n", False)
    assert (third.note, third.run) == ("not run: it is slow", False)


def test_an_exit_code_that_is_not_said_is_a_fault() -> None:
    block = blocks(PAGE)[0]
    right = Outcome(block=block, command="false", shown=["old"], printed=["old"], code=2)
    wrong = Outcome(block=block, command="false", shown=["old"], printed=["old"], code=1)
    assert (right.fault, "exits with 1, not with 2" in wrong.fault) == ("", True)


def test_a_page_is_rewritten_where_it_is_wrong() -> None:
    block = blocks(PAGE)[0]
    outcome = Outcome(block=block, command="false\ntrue", shown=["old"], printed=["new"], code=2)
    assert rewritten(PAGE, [outcome]) == PAGE.replace("old", "new")
