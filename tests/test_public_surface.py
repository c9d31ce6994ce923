"""`miles_core.__all__` is the contract with plugin authors: complete, sorted, documented."""

from __future__ import annotations

import inspect
import typing

import miles_core
from miles_core import hooks, specs


def test_surface_is_sorted_constants_first_then_classes_then_functions() -> None:
    rank = {name: (not name.isupper(), not name[0].isupper(), name) for name in miles_core.__all__}
    assert list(miles_core.__all__) == sorted(rank, key=rank.__getitem__)


def test_everything_public_is_listed() -> None:
    public = {
        name
        for name, value in vars(miles_core).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name not in {"Any", "TYPE_CHECKING"}
    }
    assert public <= set(miles_core.__all__)


def test_everything_listed_exists_and_is_documented() -> None:
    for name in miles_core.__all__:
        value = getattr(miles_core, name)
        assert isinstance(value, int) or inspect.getdoc(value), f"{name} has no docstring"


def test_every_record_is_public_and_has_a_hook_that_yields_it() -> None:
    records = {
        name
        for name, value in vars(specs).items()
        if inspect.isclass(value) and issubclass(value, specs.Spec) and value is not specs.Spec
    }
    assert records <= set(miles_core.__all__)
    declared = {
        str(typing.get_type_hints(hook, {**vars(hooks), "specs": specs})["return"]).rpartition(".")[2].rstrip("]")
        for name, hook in vars(hooks.DeclarationHooks).items()
        if name.startswith("miles_")
    }
    assert declared == records


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(miles_core, "Nothing")
