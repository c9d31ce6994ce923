"""The sessions of this repository: `nox` runs what CI runs, `nox -s arithmetic` the main job, `nox -l` lists them all.

Most sessions share one environment, `.nox/workspace`, because a second copy of torch, transformers and Ray
would cost minutes. To work in it: `nox -s workspace && source .nox/workspace/bin/activate`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import nox
from packaging.requirements import Requirement

T = TypeVar("T")
ROOT = Path(__file__).parent
MEMBERS = sorted(
    pyproject.parent.relative_to(ROOT)
    for pattern in ("miles-core", "miles-plugins/*", "miles-models/*")
    for pyproject in ROOT.glob(f"{pattern}/pyproject.toml")
)
EXAMPLE = Path("docs/examples/acme-suffix-reward")
"""A plugin from outside, which knows nothing of this repository."""
EXAMPLES = sorted(pyproject.parent for pyproject in ROOT.glob("docs/examples/*/pyproject.toml"))
"""All of them; the others need more than wheels can bring, and tests/ tries them."""
MEMBER = {member.name: member for member in MEMBERS}
NAMES = list(MEMBER)
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
# Installed first, so that nothing is built in an environment of its own; setuptools is for what has no wheel on PyPI.
BUILDERS = ("editables", "hatchling", "setuptools")
EXTRAS = {"miles-core": "[testing]", "miles-torch": "[gguf]", "miles-trackers": "[mlflow,tensorboard,wandb]"}
"""What is tested of a distribution beyond what it needs."""
# megatron-core 0.19 declares Python 3.12, but its wheel for 3.11 works; so it needs a call of its own.
UNDECLARED = ("megatron-core", "psutil")
SGLANG = ("sglang==0.5.17", "xgrammar==0.2.1", "apache-tvm-ffi==0.1.11", "openai==2.6.1")
"""What is installed without what it declares, which asks for CUDA."""
GPU_EXTRAS = {"miles-megatron": "[te]", "miles-sglang": "[engine]"}
"""What the docs tell to install on GPUs."""
SHOWN = ("megatron-core==", "ray==", "sglang==", "torch==", "transformer-engine==", "transformers==")
STAND_IN = "./tests/stand_ins/pycosat"
"""Instead of the one dependency that is compiled when it is installed."""
TOOLS = ("hypothesis", "mkdocs-material", "mypy", "nox", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "uv")
SIDE_BY_SIDE = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
"""How pytest uses several processors: a process takes whole files, because their fixtures are runs by Ray, four of
which fill a machine's memory."""

# pip, and not uv, because only pip sees the find-links and indexes that pip is configured with, where a machine may
# keep its CPU build of torch.
nox.options.default_venv_backend = "virtualenv"


@nox.session(default=False, reuse_venv=True)
def workspace(session: nox.Session) -> None:
    """Install every distribution, editable, and the tools; the other sessions run in this environment."""
    session.install(*CONSTRAINTS, *BUILDERS)
    if not compiles():
        session.install("--no-build-isolation", STAND_IN)
    editable = [part for member in MEMBERS for part in ("-e", f"./{member}{EXTRAS.get(member.name, '')}")]
    session.install("--no-build-isolation", *CONSTRAINTS, *editable, *TOOLS)
    session.install("--no-deps", "--ignore-requires-python", *CONSTRAINTS, *UNDECLARED)


def compiles() -> bool:
    """Whether extensions in C can be built here: with a compiler, and with Python's headers."""
    (compiler, *_) = str(sysconfig.get_config_var("CC") or "cc").split()
    return bool(shutil.which(compiler)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def run(session: nox.Session, program: str, *arguments: str | Path, **environment: str) -> None:
    """Run one of the workspace's programs, on one thread, with the others on its path."""
    programs = session.cache_dir.parent.resolve() / "workspace" / "bin"
    path = os.pathsep.join((str(programs), os.environ["PATH"]))
    variables = {"PATH": path, "OMP_NUM_THREADS": "1", **environment}
    session.run(programs / program, *arguments, env=variables, external=True)


def see_workspace(session: nox.Session, environment: Path) -> None:
    """Let an environment see what the workspace's has, below what it has itself."""
    (above,) = environment.glob("lib/python*/site-packages")
    (below,) = (session.cache_dir.parent.resolve() / "workspace").glob("lib/python*/site-packages")
    (above / "workspace.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, errors, and the ceilings on a function's branches and statements."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    for example in EXAMPLES:  # as its author would, without this repository's settings
        with session.chdir(example):
            session.run("ruff", "check", "--isolated", "--line-length", "120")
            session.run("ruff", "format", "--check", "--isolated", "--line-length", "120")


@nox.session(venv_backend="none", requires=["workspace"])
def types(session: nox.Session) -> None:
    """Mypy, strict for all sources; in tests, functions without annotations are left alone."""
    side_by_side(lambda check: check(session), (types_of_sources, types_of_tests))


def types_of_sources(session: nox.Session) -> None:
    """With a cache of its own, as `types_of_tests` has: options that differ make another's useless."""
    sources = (*(str(member / "src") for member in MEMBERS), "benchmarks", "noxfile.py")
    run(session, "mypy", "--cache-dir", ".mypy_cache/sources", *sources)


def types_of_tests(session: nox.Session) -> None:
    """See `types`."""
    lenient = (
        "--cache-dir", ".mypy_cache/tests", "--allow-untyped-defs", "--allow-incomplete-defs",
        "--allow-untyped-calls", "--no-check-untyped-defs", "--no-warn-unused-ignores",
    )  # fmt: skip
    # One run each, because tests of different distributions may have the same module name.
    for folder in (*(member / "tests" for member in MEMBERS), Path("tests"), *EXAMPLES):
        if any(folder.rglob("*.py")):
            run(session, "mypy", *lenient, folder)
    run(session, "mypy", *lenient, "--exclude", "^docs/examples/", "docs")


@nox.session(venv_backend="none", requires=["workspace"])
def tests(session: nox.Session) -> None:
    """All tests; arguments go to pytest: `nox -s tests -- -k grpo`."""
    run(session, "pytest", *SIDE_BY_SIDE, *session.posargs)


@nox.session(default=False, reuse_venv=True, requires=["workspace"])
def oracles(session: nox.Session) -> None:
    """Compare the algorithms with TRL, verl, OpenRLHF and AReaL, in an environment that lies over the workspace's."""
    session.install("--no-deps", "-r", str(ROOT / "tests" / "oracles" / "requirements.txt"))
    see_workspace(session, Path(session.virtualenv.location))
    session.run("python", "-m", "pytest", "tests/oracles", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(reuse_venv=True, requires=["workspace"])
def sglang(session: nox.Session) -> None:
    """The engine sglang with a real server, without a GPU, in an environment that lies over the workspace's."""
    see_workspace(session, Path(session.virtualenv.location))
    session.install("-r", str(ROOT / "miles-plugins/miles-sglang/cpu-requirements.txt"))
    session.install("--no-deps", *SGLANG)
    # Its contract tests start a server a rule; tests/test_engine.py tries the same rules on one server.
    tests = ("miles-plugins/miles-sglang", "tests/test_sglang_run.py", "--ignore-glob", "*/test_contract.py")
    session.run("python", "-m", "pytest", *tests, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(default=False, venv_backend="none", requires=["workspace"])
def resolve(session: nox.Session) -> None:
    """Whether what the docs tell to install on GPUs goes together: for Linux and Python 3.12; nothing is installed."""
    folder = Path(session.create_tmp()).resolve()
    wanted, found = folder / "wanted.in", folder / "found.txt"
    names = {name: f"{name}{GPU_EXTRAS.get(name, '')}" for name in NAMES}
    wanted.write_text("".join(f"{names[name]} @ {(ROOT / MEMBER[name]).as_uri()}\n" for name in NAMES))
    platform = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34")
    run(session, "uv", "pip", "compile", "-q", "--no-annotate", *platform, "-o", found, wanted)
    session.log("\n".join(line for line in found.read_text().splitlines() if line.startswith(SHOWN)))


@nox.session(venv_backend="none", requires=["workspace"])
def package(session: nox.Session) -> None:
    """Build every wheel, and use each with nothing but what it declares: `nox -s package -- miles-grpo` for one.

    Without arguments, all of them together too, with the plugin of docs/examples, which trains there.
    """
    names = session.posargs or NAMES
    with gathered(session, CONSTRAINTS, [f"./{member}" for member in MEMBERS]) as wheels:
        side_by_side(lambda name: try_wheels(session, wheels, [name]), names)
        if not session.posargs:
            run(session, "pip", "wheel", "-qq", "--no-build-isolation", "--no-deps", "-w", wheels, f"./{EXAMPLE}")
            environment = try_wheels(session, wheels, [*names, EXAMPLE.name])
            run(session, "pytest", "tests/test_third_party.py", MILES_WHEELS=str(environment))


def try_wheels(session: nox.Session, wheels: Path, names: list[str]) -> Path:
    """Import, list and check `names` where nothing else is; the environment's folder."""
    environment = from_wheels(session, wheels, names)
    for command in (("list",), ("check", *names) if len(names) == 1 else ("check",)):
        session.log(session.run(environment / "bin" / "miles", "plugins", *command, external=True, silent=True))
    return environment


def side_by_side(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Do the work for all items, on as many processors as there are; it runs programs of one process."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, items))


@contextmanager
def gathered(session: nox.Session, constraints: Sequence[str], wanted: Sequence[str]) -> Iterator[Path]:
    """A folder with one wheel of each of `wanted` and of everything that they depend on.

    pip fills it; uv then makes environments from it alone, by hard links, so that each costs seconds.
    """
    shutil.rmtree(session.create_tmp())
    wheels = Path(session.create_tmp()).resolve() / "wheels"
    more = () if compiles() else (STAND_IN,)
    run(session, "pip", "wheel", "-qq", "--no-build-isolation", *constraints, "-w", wheels, *wanted, *more)
    yield wheels
    shutil.rmtree(session.create_tmp())  # gigabytes; left for a look only if something fails


def from_wheels(session: nox.Session, wheels: Path, names: Sequence[str], *more: str) -> Path:
    """A new environment with `names` and `more` and what they depend on; every module of `names` is imported there."""
    environment = wheels.parent / ("all" if len(names) > 1 else names[0])
    session.env["PYTHONDONTWRITEBYTECODE"] = ""  # what is imported here, is so more than once, and uv compiles nothing
    run(session, "uv", "venv", "-q", "--clear", environment)
    python = environment / "bin" / "python"
    # A cache of its own: uv knows a wheel again by its name, and ours keep their names when they change.
    where = ("--offline", "--no-index", "--find-links", wheels, "--cache-dir", wheels.parent / "cache")
    run(session, "uv", "pip", "install", "-q", *where, "--python", python, *names, *more)
    # Isolated (-I): neither the working folder nor PYTHONPATH may lend a module that the wheel lacks.
    packages = [name.replace("-", "_") for name in names]
    session.run(python, "-I", ROOT / "tests" / "import_all.py", *packages, external=True)
    return environment


@nox.session(venv_backend="none", requires=["workspace"])
def template(session: nox.Session) -> None:
    """What `miles plugins new` writes, for every kind (or `-- KIND`): install, test, build, check and lint it."""
    programs = session.cache_dir.parent.resolve() / "workspace" / "bin"
    code = "from miles_core.scaffold import KINDS; print(*KINDS)"
    kinds = session.posargs or str(session.run(programs / "python", "-c", code, silent=True, external=True)).split()
    with tempfile.TemporaryDirectory() as folder:  # not below .nox, where ruff does not look
        side_by_side(lambda kind: try_template(session, programs, kind, Path(folder).resolve() / kind), kinds)


def try_template(session: nox.Session, programs: Path, kind: str, folder: Path) -> None:
    """The whole way of one plugin, with the time that it takes its author; and its style. Its environment lies over the
    workspace's."""
    environment = folder.with_name(f"{kind}-environment")
    session.run(programs / "uv", "venv", "-q", environment, external=True)
    see_workspace(session, environment)
    name, started = f"acme-{kind}", time.monotonic()

    def python(*arguments: str, at: Path = folder) -> None:
        command = [str(environment / "bin" / "python"), "-m", *arguments]
        # Its author has pytest alone, and not the workspace's plugins of it.
        alone = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "VIRTUAL_ENV": str(environment)}
        done = subprocess.run(  # noqa: S603 — the session itself cannot be in several folders
            command, cwd=at, env={**os.environ, **alone}, check=False, capture_output=True, text=True
        )
        session.log(f"{name}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            session.error(f"{name}: {' '.join(arguments)} ended with {done.returncode}")

    python("miles_core", "plugins", "new", name, "--kind", kind, "--folder", str(folder), at=folder.parent)
    python("uv", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", ".")
    works = [("pytest", "-q"), ("hatchling", "build"), ("miles_core", "plugins", "check", name)]
    side_by_side(lambda work: python(*work), works)  # none needs another
    session.log(f"{kind}: {time.monotonic() - started:.1f} s from nothing to a checked wheel")
    style = ("--isolated", "--line-length", "120", ".")
    python("ruff", "check", *style)
    python("ruff", "format", "--check", *style)


@nox.session(default=False, venv_backend="none", requires=["workspace"])
def alone(session: nox.Session) -> None:
    """The contract tests of each plugin with nothing but what it declares: `nox -s alone -- miles-grpo` for one.

    Those that need more, such as torch, are skipped with that reason.
    """
    try_contracts(session, CONSTRAINTS, session.posargs or NAMES, {})


@nox.session(default=False, venv_backend="none", requires=["workspace"])
def minimums(session: nox.Session) -> None:
    """The contract tests of each plugin with the lowest versions that it declares: `nox -s minimums -- miles-grpo`.

    Extras are installed too, so that what needs torch runs.
    """
    names = session.posargs or NAMES
    lowest = Path(session.create_tmp()).parent.resolve() / "lowest.txt"
    lowest.write_text("\n".join(sorted({line for name in (*names, "miles-core") for line in floors(name)})))
    try_contracts(session, ("-c", str(lowest)), names, EXTRAS)


def try_contracts(
    session: nox.Session, constraints: Sequence[str], names: Sequence[str], extras: Mapping[str, str]
) -> None:
    """An environment for each of the distributions, with its extras and miles-core's, and its contract tests in it."""
    tools = ("pytest", "pytest-timeout")
    needed = {other for name in names for other in (name, *requirements(MEMBER[name])) if other in MEMBER}
    folders = [f"./{MEMBER[name]}{extras.get(name, '')}" for name in sorted(needed)]
    with gathered(session, constraints, [*folders, *tools]) as wheels:
        for name in names:
            more = [f"{other}{extra}" for other, extra in extras.items() if other in (name, "miles-core")]
            python = from_wheels(session, wheels, [name], *more, *tools) / "bin" / "python"
            if "miles-core" in extras:  # what a rule may take shall not be spent on the first import from a cold disk
                session.run(python, "-c", "import torch, transformers", external=True)
            tests = f"{MEMBER[name]}/tests/test_contract.py"
            # What other tests share (conftest.py) may import more than is declared.
            once = ("-m", "pytest", "-q", "--noconftest", tests)
            session.run(python, *once, env={"OMP_NUM_THREADS": "1"}, external=True)


def requirements(member: Path) -> dict[str, Requirement]:
    """Name -> requirement, of what a distribution declares and of what those of this repository among it declare."""
    project = tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]
    found = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    for other in MEMBERS:
        if other.name in found:
            found = {**requirements(other), **found}
    return found


def floors(name: str) -> Iterator[str]:
    """The lowest versions, as constraints, of everything from elsewhere that the distribution `name` declares, with the
    extras that are tested."""
    project = tomllib.loads((ROOT / MEMBER[name] / "pyproject.toml").read_text())["project"]
    optional = project.get("optional-dependencies", {})
    tested = [text for extra, texts in optional.items() if extra in EXTRAS.get(name, "") for text in texts]
    for requirement in (*requirements(MEMBER[name]).values(), *map(Requirement, tested)):
        if requirement.name not in MEMBER:
            (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
            yield f"{requirement.name}=={lowest}"


@nox.session(venv_backend="none", requires=["workspace"])
def docs(session: nox.Session) -> None:
    """Build the site into site/, every link and anchor checked; run every command, example and hook that it shows."""
    run(session, "mkdocs", "build", "--strict", NO_MKDOCS_2_WARNING="1")
    run(session, "pytest", *SIDE_BY_SIDE, "docs", *session.posargs, MILES_SITE=str(ROOT / "site"))


@nox.session(default=False, venv_backend="none", requires=["workspace"])
def arithmetic(session: nox.Session) -> None:
    """The main job: a small model learns arithmetic. Arguments go to `miles train`: `nox -s arithmetic -- seed=1`."""
    run(session, "miles", "train", "arithmetic", *session.posargs)
