"""`miles plugins new`: a complete, small plugin, from the templates in miles_core/templates.

Templates are `string.Template`s, one folder a kind and one for what all kinds have. Everything is checked and rendered
before the first file is written, so nothing is ever overwritten or left half done.
"""

from __future__ import annotations

import ast
import importlib.resources
import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from string import Template

from miles_core import __version__
from miles_core.declarations import core_names
from miles_core.errors import UserError, nearest
from miles_core.plugins import CORE, normalised

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a template brings. summary: of its component; usage: README's words on using it; dependencies: its
    requirements beside miles-core; test_dependencies: those of its tests alone."""

    summary: str
    usage: str
    dependencies: tuple[str, ...] = ()
    test_dependencies: tuple[str, ...] = ()


def _toml(text: str) -> str:
    return f"In a run file:\n\n```toml\n{text}\n```"


_NUMPY = ("numpy>=1.26",)
_TORCH = ("torch>=2.11",)
_MODELS = ("safetensors>=0.5", "torch>=2.11", "transformers>=4.57.1")

KINDS: Mapping[str, Kind] = {
    "rollout": Kind(
        summary="The policy answers, is asked once more, and answers again",
        usage=_toml('[rollout]\nname = "$component"\nquestion = "Really?"'),
        dependencies=_NUMPY,
    ),
    "engine": Kind(
        summary="Transformers on a CPU, one sequence after the other",
        usage=_toml('[engine]\nname = "$component"'),
        dependencies=("numpy>=1.26", "torch>=2.11", "transformers>=4.57.1"),
        test_dependencies=("tokenizers>=0.21",),
    ),
    "trainer": Kind(
        summary="Transformers and plain PyTorch on one process, one sample after the other",
        usage=_toml('[trainer]\nname = "$component"\nlearning_rate = 1e-4'),
        dependencies=("numpy>=1.26", *_MODELS),
        test_dependencies=("tokenizers>=0.21",),
    ),
    "weight-sync": Kind(
        summary="Weights travel as files in a folder that trainer and engines see",
        usage=_toml('[publish]\nsync = "$component"'),
        dependencies=("safetensors>=0.5", "torch>=2.11"),
        test_dependencies=_NUMPY,
    ),
    "reward": Kind(
        summary="1 if the response ends with the reference answer",
        usage=_toml('[reward]\nname = "$component"\nignore_case = false'),
    ),
    "filter": Kind(
        summary="Drops prompts whose best sample is not good enough",
        usage=_toml('filters = [{ name = "$component", least = 0.5 }]'),
    ),
    "advantage": Kind(
        summary="Reward minus the median of the prompt's samples",
        usage=_toml('[advantage]\nname = "$component"'),
        dependencies=_NUMPY,
    ),
    "loss": Kind(
        summary="Policy gradient with a bounded importance weight",
        usage=_toml('[loss]\nname = "$component"\nratio_max = 4.0'),
        test_dependencies=_TORCH,
    ),
    "correction": Kind(
        summary="Tokens that rollout and trainer disagree on count less",
        usage=_toml('corrections = [{ name = "$component", softness = 0.5 }]'),
        test_dependencies=_TORCH,
    ),
    "data-source": Kind(
        summary="Additions without end",
        usage=_toml('[data]\nname = "$component"\ndigits = 3'),
        dependencies=_NUMPY,
    ),
    "model": Kind(
        summary="Mistral, dense",
        usage="A run whose `model.path` has the architecture `MistralForCausalLM` uses it; for a new model:\n\n"
        '```toml\n[model]\nfamily = "$component"\nconfig = { hidden_size = 256, num_hidden_layers = 4 }\n```',
        test_dependencies=_MODELS,
    ),
    "tracker": Kind(
        summary="Metrics as a table of comma-separated values in the run folder",
        usage=_toml('trackers = [{ name = "$component", prefix = "eval/" }]'),
    ),
    "callback": Kind(
        summary="Writes down at which step an evaluation was best",
        usage=_toml('callbacks = [{ name = "$component", metric = "eval/reward" }]'),
    ),
    "recipe": Kind(
        summary="A small new model learns to add two numbers",
        usage="```bash\nmiles train $component\n```",
        dependencies=("miles-grpo>=0.1,<0.2",),
    ),
    "command": Kind(
        summary="Show a metric of a run, step by step",
        usage="```bash\nmiles $component runs/NAME --metric reward\n```",
        dependencies=("click>=8.1",),
    ),
}
"""The kinds that there is a template for: all of them."""


def new_plugin(name: str, kind: str, folder: Path) -> list[Path]:
    """Writes a plugin called `name` into `folder` and returns its files, relative to it, in order.

    name: of the distribution; the package is the same with underscores, and the component without "miles-". Raises
    `UserError`, before anything is written, for an unknown kind, a name that is no name or is taken, and a folder that
    is not empty; and for a folder that cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"there is no kind {kind!r}. {nearest(kind, KINDS)}")
    _check_name(name)
    values = _values(name, kind)
    _check_component(values["component"], kind)
    files = _files(kind, values)
    try:
        _check_folder(folder)
        for path, text in sorted(files.items()):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Choose another folder with --folder.") from None
    return sorted(files)


def component_of(name: str) -> str:
    """What the component of a plugin is called."""
    return name.removeprefix("miles-")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a plugin: it must begin with a letter and consist of lower-case letters, digits "
            "and single hyphens, such as acme-suffix-reward"
        )
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or package in sys.stdlib_module_names:
        raise UserError(f"{name!r} is no name for a plugin: {package} already means something in Python")
    try:
        found = version(name)
    except PackageNotFoundError:
        pass
    else:
        raise UserError(f"{normalised(name)} {found} is installed already; choose another name")
    if find_spec(package) is not None:
        raise UserError(f"there is a module {package} already; choose another name")


def _check_component(component: str, kind: str) -> None:
    """The component gives its name to functions, classes and a test, and stands beside those of core in run files."""
    noun = kind.replace("-", " ")
    if (noun, component) in core_names():
        raise UserError(f"the {noun} {component!r} is {CORE}'s own; choose another name")
    refused = f"a plugin's {noun} cannot be called {component!r}:"
    for variable, name in _identifiers(component).items():
        others = _names_beside(variable, kind)
        if others and (not name.isidentifier() or keyword.iskeyword(name)):
            raise UserError(f"{refused} nothing in Python can be called {name}")
        if name in others:
            raise UserError(f"{refused} {name} means something else in its code")
    if component == "contract":
        raise UserError(f"{refused} tests/test_contract.py is for the rules of Miles")


def _identifiers(component: str) -> dict[str, str]:
    """What a component is called in Python."""
    words = component.split("-")
    return {"function": "_".join(words), "Class": "".join(word.capitalize() for word in words)}


def _names_beside(variable: str, kind: str) -> set[str]:
    """All other names in those of a kind's modules that say the one of a variable; none if no module does."""
    values = _values("acme-stand-in", kind)
    found: set[str] = set()
    for path, text in _files(kind, values).items():
        names = set(_names(ast.parse(text))) if path.suffix == ".py" else set()
        if values[variable] in names:
            found |= names - {values[variable]}
    return found


def _names(module: ast.Module) -> Iterator[str]:
    """Everything that a module gives a name to, or reads by its name."""
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; nothing was written. Choose another folder with --folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder with --folder.")


def _values(name: str, kind: str) -> dict[str, str]:
    """What a template's variables stand for."""
    chosen = KINDS[kind]
    component = component_of(name)
    release = [int(part) for part in __version__.split(".")[:2]]
    values = {
        "name": name,
        "package": name.replace("-", "_"),
        "component": component,
        **_identifiers(component),
        "kind": kind.replace("-", " "),
        "summary": f"{chosen.summary}.",
        "floor": ".".join(map(str, release)),
        "ceiling": f"0.{release[1] + 1}" if release[0] == 0 else str(release[0] + 1),
        "dependencies": "".join(f'    "{requirement}",\n' for requirement in chosen.dependencies),
        "test_dependencies": "".join(f', "{requirement}"' for requirement in chosen.test_dependencies),
    }
    return {**values, "usage": Template(chosen.usage).substitute(values)}


def _files(kind: str, values: Mapping[str, str]) -> dict[Path, str]:
    """Path below the plugin's folder -> text."""
    files = {_target(path, kind, values): Template(text).substitute(values) for path, text in _templates(kind)}
    return {**files, Path("src", values["package"], "py.typed"): ""}


def _templates(kind: str) -> Iterator[tuple[PurePosixPath, str]]:
    """(folder and file, text) of the common templates and of the kind's own."""
    root = importlib.resources.files("miles_core") / "templates"
    for folder in ("common", kind):
        for file in sorted((root / folder).iterdir(), key=lambda file: file.name):
            yield PurePosixPath(folder, file.name.removesuffix(".txt")), file.read_text(encoding="utf-8")


def _target(path: PurePosixPath, kind: str, values: Mapping[str, str]) -> Path:
    """Where a template's text goes."""
    special = {
        "common/gitignore": ".gitignore",
        "common/publish.yml": ".github/workflows/publish.yml",
        "common/test_contract.py": "tests/test_contract.py",
        f"{kind}/test_part.py": f"tests/test_{values['function']}.py",
        "recipe/recipe.toml": f"src/{values['package']}/recipes/{values['component']}.toml",
    }
    if str(path) in special:
        return Path(special[str(path)])
    return Path(path.name) if path.parts[0] == "common" else Path("src", values["package"], path.name)
