"""Every Markdown file of the repository: its links lead somewhere and its examples are valid."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "miles-*/README.md", "miles-*/*/README.md")
    for page in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_FENCE.sub("", (ROOT / page).read_text())):
        path = ROOT / page.parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{page} links to {target}#{anchor}"


def _fault(language: str, text: str) -> str:
    """Why an example in that language is not valid, else nothing. Languages without a parser here are not looked at."""
    parsers: dict[str, Callable[[str], object]] = {"python": ast.parse, "toml": tomllib.loads, "json": json.loads}
    parse = parsers.get(language)
    try:
        if parse is not None:
            parse(text)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_examples_are_valid(page: Path) -> None:
    faults = {text: _fault(language, text) for language, text in _FENCE.findall((ROOT / page).read_text())}
    assert not {text: fault for text, fault in faults.items() if fault}


def test_readme_lists_every_distribution() -> None:
    folders = {
        path.parent.name for pattern in ("miles-*", "miles-*/*") for path in ROOT.glob(f"{pattern}/pyproject.toml")
    }
    assert folders == set(re.findall(r"\[(miles-[\w-]+)\]\(", (ROOT / "README.md").read_text()))
