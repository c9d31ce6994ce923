"""The page on Megatron names all that Miles sets itself."""

from __future__ import annotations

from pathlib import Path

from miles_megatron import surface

PAGE = Path(__file__).parent / "how-to" / "train-with-megatron.md"


def test_every_field_that_miles_sets_is_on_the_page() -> None:
    text = PAGE.read_text()
    reserved = {name for section in surface.RESERVED.values() for name in section}
    assert not {name for name in reserved if f"`{name}`" not in text}
    assert all(f"`{name}`" in text for name in surface.OPEN["checkpoint"][0])
    assert all(f"`[trainer.{section}]`" in text for section in surface.SECTIONS)
