"""Every command that a page shows is run, and prints what is shown.

Pages that go on from a tutorial are in test_arithmetic_pages.py: two processes can test side by side.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import ROOT, Outcome, Workshop, blocks, first, matches, pages, rewritten

pytestmark = pytest.mark.timeout(900)
TUTORIAL = ROOT / "docs/tutorials/arithmetic.md"

PAGES = pages()
ALONE = [page for page in PAGES if first(page) != TUTORIAL]


@pytest.mark.slow
@pytest.mark.parametrize("page", ALONE, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_print_what_is_shown(page: Path, workshop: Workshop) -> None:
    workshop.check(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_not_run_says_who_runs_it_or_why_not(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language in ("console", "bash") and not block.run:
            reason = block.note.removeprefix("not run: ")
            for name in re.findall(r"[\w./-]+\.py", reason):
                assert (ROOT / name).is_file(), f"{page} says that {name} runs it"


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
