"""What is installed of what plugins declare, and what of the machine matters to a run: `miles doctor`.

Everything is read from the metadata of distributions, and of the GPUs from NVIDIA's own command; nothing heavy is
imported. What a plugin needs beyond itself it says as extras; which extra a component needs, its record says.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from miles_core.plugins import normalised

_QUERY = "name,memory.total,driver_version"
_QUERY_LIMIT_S = 20


@dataclass(frozen=True, kw_only=True)
class Need:
    """One requirement of a distribution. requirement: as it is declared; found: the installed version, None without
    one; good: whether that is what is asked for."""

    requirement: str
    found: str | None
    good: bool

    @property
    def lack(self) -> str:
        """What a sentence on a need that is not good ends with."""
        return "which is not installed" if self.found is None else f"and {self.found} is installed"


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU as its driver describes it. memory: with its unit."""

    name: str
    memory: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where this process runs. torch: the installed version, and cuda: the CUDA that it is built for; None without."""

    python: str
    platform: str
    torch: str | None
    cuda: str | None
    gpus: tuple[GPU, ...]


def need(text: str) -> Need:
    """What there is of one requirement."""
    wanted = Requirement(text)
    found = _version(wanted.name)
    good = found is not None and wanted.specifier.contains(found, prereleases=True)
    return Need(requirement=text, found=found, good=good)


def unmet(requirements: Iterable[str]) -> Iterator[Need]:
    """Those of the requirements that apply here and are not met."""
    for text in requirements:
        if _applies(Requirement(text), "") and not (found := need(text)).good:
            yield found


def extras(name: str) -> list[str]:
    """The extras that a distribution declares; none if it is not installed."""
    found = _distribution(name)
    return [] if found is None else sorted(found.metadata.get_all("Provides-Extra") or ())


def needs(name: str, extra: str = "") -> Iterator[Need]:
    """What a distribution needs for itself, or for one of its extras, an extra within an extra opened; nothing of one
    that is not installed."""
    found = _distribution(name)
    for text in (found.requires or ()) if found is not None else ():
        wanted = Requirement(text)
        if not _applies(wanted, extra) or (extra and _applies(wanted, "")):
            continue
        if normalised(wanted.name) == normalised(name):
            for inner in sorted(wanted.extras):
                yield from needs(name, inner)
        else:
            yield need(_plain(wanted))


def machine() -> Machine:
    """This one."""
    return Machine(
        python=platform.python_version(),
        platform=f"{sys.platform} {platform.machine()}",
        torch=_version("torch"),
        cuda=_torch_cuda(),
        gpus=tuple(_gpus()),
    )


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _plain(wanted: Requirement) -> str:
    """The requirement without the condition that it stands under."""
    inner = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    return f"{wanted.name}{inner}{wanted.specifier}"


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _version(name: str) -> str | None:
    found = _distribution(name)
    return None if found is None else found.version


def _torch_cuda() -> str | None:
    """From the file in which torch's build notes it; importing torch would take seconds."""
    found = _distribution("torch")
    file = Path(str(found.locate_file("torch/version.py"))) if found is not None else None
    if file is None or not file.is_file():
        return None
    match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", file.read_text("utf-8"), re.MULTILINE)
    return match[1] if match else None


def _gpus() -> Iterator[GPU]:
    """None where NVIDIA's command is missing or fails: then there is no driver that could be used."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return
    try:
        asked = [command, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        said = subprocess.run(  # noqa: S603 — the driver's own command
            asked, capture_output=True, text=True, timeout=_QUERY_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    for line in said.stdout.splitlines():
        name, memory, driver = (part.strip() for part in line.rsplit(",", 2))
        yield GPU(name=name, memory=memory, driver=driver)
