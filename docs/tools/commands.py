"""Runs the commands that a page shows, and compares what they print with what is shown.

- A fenced block with `title="FILE"` is that file, in the folder in which the page's commands run.
- A block `console` has commands after "$ " and what they print. A line "…" stands for any lines, "…" within a line for
  any text.
- A block `bash` has commands that are run and print what they like.
- A comment above a block says what is special: `<!-- exits with 2 -->`, or `<!-- not run: REASON -->`.
- A comment `<!-- continues PAGE -->` in a page: it begins in a copy of the folder that the commands of that page leave.

`python docs/tools/commands.py PAGE…` runs the pages and writes what their commands print today into them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "/home/you"
"""What pages call the folder in which their commands run."""
ANY = "…"
LIMIT_S = 600
"""Seconds that a command may take."""

_FENCE = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>[\w+-]*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_CONTINUES = re.compile(r"^<!-- continues (\S+) -->$", re.MULTILINE)
_PROGRAMS = {"miles": "miles_core", "pip": "pip", "pytest": "pytest", "hatchling": "hatchling"}
"""Programs of a page's environment -> the module that each runs."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page. start, end: of its text in the page's. indent: of its lines there."""

    language: str
    title: str
    note: str
    text: str
    start: int
    end: int
    indent: str

    @property
    def run(self) -> bool:
        """Whether its commands are run."""
        return self.language in ("console", "bash") and not self.note.startswith("not run: ")

    @property
    def code(self) -> int:
        """The exit code that its commands shall have."""
        found = re.fullmatch(r"exits with (\d+)", self.note)
        return int(found[1]) if found else 0

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each command, and the lines that it is shown to print."""
        if self.language == "bash":
            joined = re.sub(r"\\\n", "", self.text)
            yield from ((line, []) for line in joined.splitlines() if line.strip() and not line.startswith("#"))
            return
        command, lines = "", list[str]()
        for line in self.text.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, lines
                command, lines = line[2:], []
            elif line.startswith("> ") and command and not lines:
                command += f"\n{line[2:]}"
            else:
                lines.append(line)
        yield command, lines


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found = []
    for match in _FENCE.finditer(page):
        title = re.search(r'title="([^"]+)"', match["info"])
        found.append(
            Block(
                language=match["language"],
                title=title[1] if title else "",
                note=match["note"] or "",
                text=re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
                start=match.start("text"),
                end=match.end("text"),
                indent=match["indent"],
            )
        )
    return found


def continued(page: str) -> str | None:
    """The page that a page goes on from, as its text says it."""
    found = _CONTINUES.search(page)
    return found[1] if found else None


def first(page: Path) -> Path:
    """The page that begins what `page` goes on from."""
    before = continued(page.read_text(encoding="utf-8"))
    return page if before is None else first((page.parent / before).resolve())


def pages() -> list[Path]:
    """All pages of the repository that show commands."""
    docs, readmes = (ROOT / "docs").rglob("*.md"), ROOT.glob("miles-*/**/README.md")
    found = (page for page in sorted((*docs, *ROOT.glob("*.md"), *readmes)) if "examples" not in page.parts)
    return [page for page in found if any(block.language in ("console", "bash") for block in blocks(page.read_text()))]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a command. shown, printed: lines."""

    block: Block
    command: str
    shown: list[str]
    printed: list[str]
    code: int

    @property
    def fault(self) -> str:
        """What is wrong, "" if nothing is."""
        printed = "\n".join(self.printed)
        if self.code != self.block.code:
            return f"$ {self.command}\nexits with {self.code}, not with {self.block.code}:\n{printed}"
        if self.block.language == "console" and not matches(self.shown, self.printed):
            return f"$ {self.command}\nprints nothing like the line {self.missing!r} of the page, but\n{printed}"
        return ""

    @property
    def missing(self) -> str:
        """The first line of what is shown that fits nothing which was printed."""
        fits = (matches([*self.shown[: count + 1], ANY], self.printed) for count in range(len(self.shown)))
        return next((line for line, fit in zip(self.shown, fits, strict=True) if not fit), "(the end)")


def matches(shown: list[str], printed: list[str]) -> bool:
    """Whether lines that a page shows stand for lines that were printed."""
    pattern = ""
    for line in shown:
        if line.strip() == ANY:
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += "[^\n]*".join(map(re.escape, normal(line).split(ANY))) + r"\n"
    return re.fullmatch(pattern, "".join(f"{normal(line)}\n" for line in printed)) is not None


_NORMAL = (
    (re.compile(r"^(step +\d+/\d+|held-out after step \d+:) .*"), r"\1 …numbers"),
    (re.compile(r"\b\d+\.\d+\.\d+(\+\w+)?\b"), "VERSION"),
    (re.compile(r"\b\d+(\.\d+)? ?s\b"), "SECONDS"),
    (re.compile(r"\s+"), " "),
)
"""What differs from one time to the next: the numbers of a step, versions, times; and how wide a column is."""


def normal(line: str) -> str:
    """A line without what differs from one time to the next."""
    for pattern, instead in _NORMAL:
        line = pattern.sub(instead, line)
    return line.strip()


@dataclass
class Shell:
    """A folder, and an environment over the one that this runs in: what a page installs stays in it. at: the working
    folder."""

    folder: Path
    environment: Path
    at: Path = Path()

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.at = self.folder / self.at
        if not self.environment.exists():
            _make_environment(self.environment)

    def run(self, command: str) -> tuple[int, list[str]]:
        """Exit code and lines of standard output and error. The working folder stays for the next command."""
        note = self.environment / "folder"
        script = f"{command}\ncode=$?; pwd > {shlex.quote(str(note))}; exit $code"
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.at,
            env=self._variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            out += f"(still running after {LIMIT_S} s)"
        if note.exists():
            self.at = Path(note.read_text().strip())
            note.unlink()
        return process.returncode, [line.replace(str(self.folder), HOME).rstrip() for line in out.splitlines()]

    def _variables(self) -> dict[str, str]:
        programs = os.pathsep.join((str(self.environment / "bin"), str(Path(sys.executable).parent)))
        own = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.environment),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "LC_ALL": "C.UTF-8",
            "PIP_NO_BUILD_ISOLATION": "0",  # which for this variable means that there is none
            "PIP_NO_INDEX": "1",  # everything is there already
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**os.environ, **own, "PYTEST_ADDOPTS": ""}  # what somebody likes to see of tests is not on the page


def _make_environment(folder: Path) -> None:
    """A virtual environment that sees everything which is installed in the one that this runs in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (above,) = folder.glob("lib/python*/site-packages")
    below = [path for path in sys.path if path.endswith("site-packages")]
    (above / "below.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in below))
    for program, module in _PROGRAMS.items():
        script = folder / "bin" / program
        script.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m {module} "$@"\n')
        script.chmod(0o755)


def run(page: str, shell: Shell) -> Iterator[Outcome]:
    """Writes the files of a page and runs its commands, in order."""
    for block in blocks(page):
        if block.title and not block.note.startswith("not run: "):
            path = shell.at / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        for command, shown in block.commands() if block.run else ():
            code, printed = shell.run(command)
            yield Outcome(block=block, command=command, shown=shown, printed=printed, code=code)


class Workshop:
    """Runs pages, each once, below one folder. All of them see the same path, so that what one leaves fits where
    another goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._home = folder / "you"
        self._done: dict[Path, tuple[Shell, list[Outcome]]] = {}

    def outcomes(self, page: Path) -> list[Outcome]:
        """Of the commands of a page."""
        return self._run(page.resolve())[1]

    def check(self, page: Path) -> None:
        """Raises `AssertionError` if a command of a page does not print what is shown."""
        faults = [outcome.fault for outcome in self.outcomes(page) if outcome.fault]
        mend = f"python docs/tools/commands.py {page.relative_to(ROOT)} writes what is printed into the page"
        assert not faults, "\n\n".join([*faults, mend])

    def left_by(self, page: Path) -> Path:
        """A folder with what the commands of a page have left."""
        self._run(page.resolve())
        return self._kept(page.resolve())

    def _kept(self, page: Path) -> Path:
        return self._folder / "kept" / f"{list(self._done).index(page)}-{page.stem}"

    def _run(self, page: Path) -> tuple[Shell, list[Outcome]]:
        if page not in self._done:
            text = page.read_text(encoding="utf-8")
            shell = self._shell(page, continued(text))
            self._done[page] = (shell, list(run(text, shell)))
            shutil.copytree(self._home, self._kept(page), symlinks=True)
        return self._done[page]

    def _shell(self, page: Path, before: str | None) -> Shell:
        other = None if before is None else (page.parent / before).resolve()
        shell = self._run(other)[0] if other else None
        shutil.rmtree(self._home, ignore_errors=True)
        if other is None or shell is None:
            return Shell(self._home, self._folder / f"environment-{len(self._done)}")
        shutil.copytree(self._kept(other), self._home, symlinks=True)
        return replace(shell)


def rewritten(page: str, outcomes: list[Outcome]) -> str:
    """The page's text with what its commands print today, where that is not what is shown."""
    for block in reversed([block for block in blocks(page) if block.run and block.language == "console"]):
        ours = [outcome for outcome in outcomes if outcome.block == block]
        lines = []
        for outcome in ours:
            first, *more = outcome.command.split("\n")
            lines += [f"$ {first}", *(f"> {line}" for line in more)]
            lines += outcome.shown if matches(outcome.shown, outcome.printed) else outcome.printed
        text = "".join(f"{block.indent}{line}".rstrip() + "\n" for line in lines)
        page = page[: block.start] + text + page[block.end :]
    return page


def main(pages: list[str]) -> None:
    """Runs pages and writes what their commands print into them."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for page in map(Path, pages):
            outcomes = workshop.outcomes(page)
            page.write_text(rewritten(page.read_text(encoding="utf-8"), outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
