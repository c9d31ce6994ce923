"""`miles models`: the model families of the installed plugins, and what they say of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from miles_core.cli.console import table

if TYPE_CHECKING:
    from miles_core.specs import ModelSpec


@click.group()
def models() -> None:
    """List model families and describe a model."""


@models.command("list")
def list_models() -> None:
    """List the families: what `model.family` accepts, the architectures they cover, and for which trainers' frameworks
    they describe them."""
    from miles_core.plugins import discover
    from miles_core.specs import ModelSpec

    rows = [
        (
            entry.spec.name,
            entry.plugin.name,
            ", ".join(sorted(entry.spec.backends)) or "-",
            ", ".join(entry.spec.architectures),
        )
        for entry in discover().all(ModelSpec)
    ]
    table(("Family", "Plugin", "Described for", "Architectures"), rows)


@models.command("info")
@click.argument("model", metavar="FAMILY_OR_MODEL")
def model_info(model: str) -> None:
    """Show a family, or a model: a Hugging Face folder, or a hub name that this machine has."""
    from pathlib import Path

    from miles_core.config.model import find_family, read_config, without_family
    from miles_core.config.schema import ModelSection
    from miles_core.errors import UserError, nearest
    from miles_core.plugins import discover
    from miles_core.specs import ModelSpec

    catalog = discover()
    names = [entry.spec.name for entry in catalog.all(ModelSpec)]
    if model.rpartition(":")[2] in names:
        _show_family(catalog.get(ModelSpec, model).spec)
        return
    if "/" not in model and not Path(model).is_dir():
        raise UserError(f"{model!r} is neither a model family nor a folder. {nearest(model, names)}")
    section, origins = ModelSection(path=model), {"model.path": model}
    config = read_config(section, origins, catalog)
    entry = find_family(section, config, origins, catalog)
    if config is None:
        raise UserError(f"{model} is not on this machine")
    if entry is None:
        raise UserError(without_family(config, catalog))
    _show_model(entry.spec, config)


def _show_family(spec: ModelSpec) -> None:
    click.echo(f"{spec.name}: {spec.summary}")
    table(
        ("Property", "Value"),
        [
            ("architectures", ", ".join(spec.architectures)),
            (
                "described for",
                ", ".join(sorted(spec.backends)) or "no framework; trainers that take any model train it",
            ),
        ],
    )


def _show_model(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    from miles_core.plugins import resolve

    _show_family(spec)
    count = resolve(spec.ref)().parameters(config)
    rows = [("parameters", f"{count:,}"), ("layers", str(config.get("num_hidden_layers", "?")))]
    for backend, ref in sorted(spec.backends.items()):
        try:
            resolve(ref)(config)
            rows.append((backend, "can be described"))
        except (KeyError, ValueError) as error:
            rows.append((backend, f"refused: {error}"))
    table(("Model", "Value"), rows)
