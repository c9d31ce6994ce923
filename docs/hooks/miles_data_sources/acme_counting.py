"""A data source that asks for the next number, without end."""

from collections.abc import Iterable
from dataclasses import dataclass

from miles_core import DataSourceSpec, hookimpl


@hookimpl
def miles_data_sources() -> Iterable[DataSourceSpec]:
    yield DataSourceSpec(
        name="counting",
        ref="acme_counting:Counting",
        options="acme_counting:CountingOptions",
        answers=True,
        summary="Asks for the number after each number; evaluation gets every tenth",
    )


@dataclass(frozen=True, kw_only=True)
class CountingOptions:
    """first: the first number that is asked about."""

    first: int = 0


class Counting:
    size = None  # it has no end

    def __init__(self, options: CountingOptions, context) -> None:
        self.first, self.context = options.first, context
        self.position = 0

    def seek(self, position: int) -> None:
        self.position = position

    def next(self):
        """A function of the position alone, so that a resumed run goes on exactly where it stopped."""
        import numpy as np

        from miles_core import Prompt
        from miles_core.errors import UserError

        place = self.position
        number = self.first + (10 * place + 9 if self.context.split == "eval" else place + place // 9)
        text = f"After {number} comes "
        tokens = np.array(self.context.tokenizer.encode(text), np.int32)
        if len(tokens) > self.context.max_prompt_tokens:
            raise UserError(f"{text!r} has {len(tokens)} tokens; raise model.max_tokens")
        self.position += 1
        return Prompt(id=place, tokens=tokens, text=text, answer=str(number + 1))
