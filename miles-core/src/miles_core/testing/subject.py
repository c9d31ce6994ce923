"""What a rule looks at: one record of a plugin, its implementation, and an example of its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from miles_core.errors import PluginError, UserError
from miles_core.plugins import Plugin, resolve
from miles_core.specs import Spec

if TYPE_CHECKING:
    from miles_core.sample import Sample

S = TypeVar("S", bound=Spec)


class SkippedError(Exception):
    """A rule cannot be tried here; the message says why."""


def skip(reason: str) -> NoReturn:
    """Ends a rule that cannot be tried here."""
    raise SkippedError(reason)


@dataclass(frozen=True, kw_only=True)
class Example:
    """How to try a component where the defaults of its options do not suffice.

    A record's `example` names a function that is called with an empty folder for whatever files it needs.
    options: as a run file says them. samples: of one prompt, for a reward or a filter that reads more than text and
    answer. config: fields of config.json for a tiny model of a family. skip: why it cannot be tried here, "" if it can.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    skip: str = ""


@dataclass(frozen=True)
class Subject(Generic[S]):
    """A record to be tried. folder: empty, for files; gone afterwards."""

    plugin: Plugin
    spec: S
    folder: Path

    @cached_property
    def example(self) -> Example:
        """The record's example, an empty one if it names none. Raises `SkippedError` if it says that it cannot be."""
        if self.spec.example is None:
            return Example()
        (self.folder / "example").mkdir(exist_ok=True)
        example = resolve(self.spec.example)(self.folder / "example")
        if not isinstance(example, Example):
            raise PluginError(f"{self.spec.example} gave a {type(example).__name__}, which is no Example")
        return skip(example.skip) if example.skip else example

    @property
    def target(self) -> Any:
        """The implementation, imported."""
        return resolve(self.spec.ref)

    def options(self, **changes: Any) -> Any:
        """The example's options with `changes`, built as from a run file; None if the record has none."""
        import tomli_w

        from miles_core.config.components import build_options
        from miles_core.config.source import read_toml

        example = {**self.example.options, **changes}
        table = read_toml(tomli_w.dumps(example), lambda line: "example")
        try:
            return build_options(self.spec, table, ())
        except UserError as error:
            hint = "" if self.spec.example else '; name an example in its record: example="module:function"'
            raise UserError(f"its options cannot be built: {error}{hint}") from error

    def make(self, *context: Any) -> Any:
        """The component, built as a run builds it: `Class(options, *context)`."""
        return self.target(self.options(), *context)
