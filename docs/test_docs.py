"""Every Markdown file of the repository: links, examples, and what README says.

Links between pages of the site are checked when it is built (`mkdocs build --strict`, in docs/conftest.py), anchors as
well.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDERS = sorted(path.parent for pattern in ("miles-*", "miles-*/*") for path in ROOT.glob(f"{pattern}/pyproject.toml"))
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "miles-*/README.md", "miles-*/*/README.md")
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text()
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


# ---- Links ----------------------------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _is_generated(path: Path) -> bool:
    """Whether it is the page of a plugin, which there is on the site alone."""
    return path.parent == DOCS / "reference" / "plugins" and path.stem in {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_FENCE.sub("", (ROOT / page).read_text())):
        path = (ROOT / page.parent / target).resolve() if target else ROOT / page
        if _is_generated(path) and page.parts[0] == "docs":
            continue
        assert path.exists(), f"{page} links to {target}"
        generated = path.suffix == ".md" and "<!-- generated: " in path.read_text()
        assert not anchor or generated or anchor in _anchors(path), f"{page} links to {target}#{anchor}"


def test_the_site_is_built_strictly(site: Path) -> None:
    """The fixture fails where a link or an anchor leads nowhere; so it must have looked at every page."""
    pages = [page.relative_to(DOCS) for page in DOCS.rglob("*.md") if "examples" not in page.parts]
    for page in pages:
        built = page.parent if page.stem == "index" else page.with_suffix("")
        assert (site / built / "index.html").is_file(), page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|link)\b[^>]*\b(?:src|href)=["']?(https?://[^"'\s>]+)""")
    found = {link for page in site.rglob("*.html") for link in loaded.findall(page.read_text())}
    assert not found


# ---- Examples -------------------------------------------------------------------------------------------------------


def _fault(language: str, text: str) -> str:
    """Why an example in that language is not valid, else nothing. Languages without a parser here are not looked at."""
    parsers: dict[str, Callable[[str], object]] = {
        "python": ast.parse,
        "toml": tomllib.loads,
        "json": json.loads,
        "jsonl": lambda lines: [json.loads(line) for line in lines.splitlines()],
    }
    parse = parsers.get(language)
    try:
        if parse is not None:
            parse(text)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_examples_are_valid(page: Path) -> None:
    faults = {block.text: _fault(block.language, block.text) for block in blocks((ROOT / page).read_text())}
    assert not {text: fault for text, fault in faults.items() if fault}


# ---- README ---------------------------------------------------------------------------------------------------------

SCREEN = README.partition("\n## ")[0]


def test_readme_lists_every_distribution() -> None:
    assert {folder.name for folder in FOLDERS} == set(re.findall(r"\[(miles-[\w-]+)\]\(", README))


def test_readme_begins_with_three_sentences_two_commands_a_picture_and_the_plugins() -> None:
    title, _, rest = SCREEN.partition("\n\n")
    paragraph = rest.partition("\n\n")[0]
    assert title == "# Miles"
    assert len(re.findall(r"\.(?=\s|$)", paragraph)) == 3
    (commands,) = blocks(SCREEN)
    assert len(commands.text.splitlines()) == 2
    places = [SCREEN.index(mark) for mark in (paragraph, "```bash", "![", "| Plugin |")]
    assert places == sorted(places)
    assert len(SCREEN.splitlines()) <= 50


def test_readmes_commands_are_sessions_of_the_noxfile() -> None:
    sessions = {
        node.name
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(mark) for mark in node.decorator_list)
    }
    assert set(re.findall(r"nox -s (\w+)", README)) <= sessions
    assert {"lint", "types", "tests", "docs"} <= sessions  # what plain `nox` runs


def test_readmes_numbers_are_those_of_the_measurements() -> None:
    measured = (DOCS / "measurements.md").read_text()
    ((warmed_up, trained),) = re.findall(r"^\| 0 \| [\d.]+ % \| ([\d.]+) % \| ([\d.]+) % \|$", measured, re.MULTILINE)
    told = [int(number) for number in re.findall(r"(\d+) %", README)]
    assert set(told) == {round(float(warmed_up)), round(float(trained))}
    (seconds,) = re.findall(r"^The whole command takes (\d+) seconds", measured, re.MULTILINE)
    assert "under three minutes" in " ".join(README.split())
    assert int(seconds) < 180


def test_readmes_requirements_are_those_of_the_distributions() -> None:
    projects: list[dict[str, Any]] = [
        tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in FOLDERS
    ]
    (floor,) = {project["requires-python"] for project in projects}
    assert f"Python {floor.removeprefix('>=')} or newer" in " ".join(README.split())


def test_readme_names_what_a_run_folder_has() -> None:
    """Which the reference lists, and a test compares with a real run."""
    table = (DOCS / "reference" / "run-folder.md").read_text()
    words = {"run.toml": "resolved run file", "manifest.json": "plugins", "metrics.jsonl": "metrics as JSON lines"}
    words |= {"checkpoints": "checkpoints", "policy": "Hugging Face folder"}
    for name, word in words.items():
        assert f"| `{name}" in table
        assert word in " ".join(README.split())
