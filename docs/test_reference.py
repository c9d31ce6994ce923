"""Nothing that a user or a plugin's author can say is missing from the site: hooks, records, options, commands, keys.

What there is comes from the code itself, and not from what generates the pages; what the site has, from its HTML.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner
from wording import description

from miles_core import hooks, roles, sample, specs
from miles_core.cli.main import cli
from miles_core.config import schema
from miles_core.plugins import discover, options_of
from miles_core.run.plan import RUN_KEYS, STAGE_KEYS
from miles_core.specs import CommandSpec, Spec
from miles_core.testing import checks, kits

ROOT = Path(__file__).parents[1]
FAMILIES = (hooks.DeclarationHooks, hooks.DriverHooks, hooks.TrainerHooks, hooks.RolloutHooks)
HOOKS = [
    pytest.param(function, id=name)
    for family in FAMILIES
    for name, function in vars(family).items()
    if inspect.isfunction(function)
]
KINDS = [kind for kind in vars(specs).values() if inspect.isclass(kind) and issubclass(kind, Spec) and kind is not Spec]
OURS = {path.parent.name for path in ROOT.glob("miles-*/**/pyproject.toml")}
RECORDS = [
    pytest.param(plugin.name, record, id=f"{plugin.name}-{record.kind}-{record.name}".replace(" ", "-"))
    for plugin in discover().plugins
    if plugin.name in OURS
    for record in plugin.records
]


class _Text(HTMLParser):
    """The text of a page, and that of each part that begins with a heading, by the heading's text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[str, list[str]]] = [("", [])]
        self._heading: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch(r"h[1-6]", tag):
            self._heading = []
        self._skipped += ("class", "headerlink") in attrs

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch(r"h[1-6]", tag) and self._heading is not None:
            self.parts.append((" ".join("".join(self._heading).split()), []))
            self._heading = None
        self._skipped -= tag == "a" and self._skipped > 0

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            (self.parts[-1][1] if self._heading is None else self._heading).append(data)


@cache
def parts(path: Path) -> dict[str, str]:
    """Heading -> the text below it, with single spaces."""
    reader = _Text()
    html = path.read_text(encoding="utf-8")
    reader.feed(html[html.index("<article") : html.index("</article>")])
    return {heading: " ".join("".join(text).split()) for heading, text in reader.parts}


def page(site: Path, name: str) -> dict[str, str]:
    return parts(site / "reference" / name / "index.html")


# ---- Hooks, records, interfaces -------------------------------------------------------------------------------------


def exactly(function: Any) -> str:
    """The signature as `inspect` has it, without self and spaces."""
    text = str(inspect.signature(function)).replace("(self, ", "(").replace("(self)", "()")
    return re.sub(r"[\s']", "", f"{function.__name__}{text}")


@pytest.mark.parametrize("function", HOOKS)
def test_every_hook_is_documented_with_its_signature_and_an_example(function: Any, site: Path) -> None:
    family = "declaration" if function.__name__.startswith("miles_") else "lifecycle"
    text = page(site, f"{family}-hooks")[function.__name__]
    assert exactly(function) in re.sub(r",(?=\))|[\s']", "", re.sub(r",\s*\)", ")", text))
    assert " ".join(function.__doc__.split())[:40] in text.replace("`", "") or "`" in function.__doc__
    example = text.partition("Since")[2]
    assert "@hookimpl" in example
    assert f"def {function.__name__}(" in example


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_record_is_documented_with_every_field(kind: Any, site: Path) -> None:
    text = page(site, "records")[kind.__name__]
    for field in dataclasses.fields(kind):
        assert re.search(rf"\b{field.name} {re.escape(str(field.type))}", text), field.name


@pytest.mark.parametrize("module", [roles, sample], ids=lambda module: module.__name__)
def test_every_interface_is_documented_with_every_method(module: Any, site: Path) -> None:
    found = page(site, "interfaces")
    for name, cls in vars(module).items():
        if not inspect.isclass(cls) or cls.__module__ != module.__name__ or name.startswith("_"):
            continue
        for member in vars(cls).get("__annotations__", {}):
            assert member in found[name], f"{name}.{member}"
        for method, function in vars(cls).items():
            if inspect.isfunction(function) and not method.startswith("_") and "<lambda>" not in function.__qualname__:
                assert f"def {method}(" in found[name], f"{name}.{method}"


# ---- Options --------------------------------------------------------------------------------------------------------


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted name, the dataclass that has it, its name there) of every option."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{field.name}.")
        elif field.init:
            yield f"{prefix}{field.name}", cls, field.name


@pytest.mark.parametrize(("plugin", "record"), RECORDS)
def test_every_component_is_documented_with_every_option(plugin: str, record: Spec, site: Path) -> None:
    text = page(site, f"plugins/{plugin}")[f"{record.kind} {record.name}"]
    assert " ".join(record.summary.replace("`", "").split()) in text
    assert record.name in " ".join(page(site, "plugins").values())
    options = options_of(record)
    for name, _, _ in leaves(options) if options else ():
        assert re.search(rf"(^|\s){re.escape(name)}\s", text), name


@pytest.mark.parametrize(("plugin", "record"), RECORDS)
def test_every_option_is_described(plugin: str, record: Spec) -> None:
    """In the docstring of its class: "name: what it is", or a sentence that names it."""
    options = options_of(record)
    missing = [name for name, cls, own in (leaves(options) if options else ()) if not description(cls, own)]
    assert not missing, f"{record.options} does not say what these are"


def test_every_plugin_has_a_page_that_holds_its_readme(site: Path) -> None:
    for folder in (path.parent for path in ROOT.glob("miles-*/**/pyproject.toml")):
        html = (site / "reference" / "plugins" / folder.name / "index.html").read_text()
        lines = (folder / "README.md").read_text().splitlines()
        first = re.split(r"[^\w ]", next(line for line in lines if re.match(r"[A-Z][\w ]+", line)))[0].strip()
        assert first in " ".join(html.split()), f"{folder.name}: {first!r}"


# ---- Run file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*RUN_KEYS, *STAGE_KEYS])
def test_every_key_of_a_run_file_is_documented(key: str, site: Path) -> None:
    found = page(site, "run-file")
    assert key in found or re.search(rf"\b{key} (a|of|tables)", found["Run file"])


SECTIONS = [cls for cls in vars(schema).values() if inspect.isclass(cls) and cls.__name__.endswith("Section")]


@pytest.mark.parametrize("section", [*SECTIONS, schema.Schedule], ids=lambda section: section.__name__)
def test_every_option_of_a_section_is_documented_and_described(section: Any, site: Path) -> None:
    (key,) = re.findall(r"^`\[(\w+)\]`", inspect.getdoc(section) or "")
    text = page(site, "run-file")[key]
    for field in dataclasses.fields(section):
        assert re.search(rf"\b{field.name} ", text), field.name
        assert description(section, field.name), f"{section.__name__} does not say what {field.name} is"


# ---- Commands and rules ---------------------------------------------------------------------------------------------


def commands(group: click.Group, above: tuple[str, ...] = ("miles",)) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield " ".join((*above, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))


@pytest.mark.parametrize(("name", "command"), [pytest.param(*found, id=found[0]) for found in commands(cli)])
def test_every_command_is_documented_with_every_flag_and_an_example(
    name: str, command: click.Command, site: Path
) -> None:
    text = page(site, "cli")[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert set(parameter.opts) <= set(re.findall(r"(?<![\w-])--?[\w-]+", text)), parameter.opts
    printed = CliRunner().invoke(cli, [*name.split()[1:], "--help"], prog_name="miles", terminal_width=88).output
    assert f"$ {name} --help {' '.join(printed.split())}" in text
    assert isinstance(command, click.Group) or re.search(rf"\$ {name}(?! --help)", text), "there is no example"


def test_the_help_of_miles_itself_is_documented(site: Path) -> None:
    printed = CliRunner().invoke(cli, ["--help"], prog_name="miles").output
    assert " ".join(printed.split()) in page(site, "cli")["Command line"]


def test_commands_of_plugins_are_documented(site: Path) -> None:
    for entry in discover().all(CommandSpec):
        if entry.plugin.name in OURS:
            text = page(site, f"plugins/{entry.plugin.name}")[f"command {entry.spec.name}"]
            assert f"miles {entry.spec.name} --help" in text


def test_every_contract_rule_is_documented(site: Path) -> None:
    text = " ".join(page(site, "contract-rules").values())
    for rule in (*checks.RULES, *(rule for kind in KINDS for rule in kits.rules_of(kind))):
        assert rule.__name__ in text
