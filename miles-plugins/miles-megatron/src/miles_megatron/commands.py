"""`miles convert`: weights between Hugging Face's format and Megatron's."""

from __future__ import annotations

import os
from pathlib import Path

import click

_SRC = click.argument("source", metavar="SRC", type=click.Path(path_type=Path, file_okay=False, exists=True))
_DST = click.argument("target", metavar="DST", type=click.Path(path_type=Path))


@click.group()
def convert() -> None:
    """Convert weights between a Hugging Face folder and Megatron's distributed format.

    Needs no GPU, and memory for a part of the model only. DST appears when it is complete.
    """


@convert.command("hf-to-dist")
@_SRC
@_DST
def hf_to_dist(source: Path, target: Path) -> None:
    """From the Hugging Face folder SRC to DST, which model.path may name and every layout can load."""
    _prepare()
    from miles_megatron import convert as conversion

    conversion.hf_to_dist(source, target)
    click.echo(f"wrote {target}; train from it with model.path={target}")


@convert.command("dist-to-hf")
@_SRC
@_DST
def dist_to_hf(source: Path, target: Path) -> None:
    """From SRC, what hf-to-dist has written or RUN/checkpoints/STEP/trainer, to the Hugging Face folder DST."""
    _prepare()
    from miles_megatron import convert as conversion

    conversion.dist_to_hf(source, target)
    click.echo(f"wrote {target}")


def _prepare() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch looks: GPUs may be busy, and nothing here gains by one
    from miles_megatron import start

    start.prepare()
