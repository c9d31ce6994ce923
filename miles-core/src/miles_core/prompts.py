"""What data sources share: how a question becomes the tokens of a prompt, and who belongs to which split.

For authors of data sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles_core.errors import UserError
from miles_core.roles import Tokenizer
from miles_core.sample import IntArray

Messages = Sequence[Mapping[str, Any]]
"""A conversation: {"role": …, "content": …} each."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns questions into prompts.

    A conversation always goes through the tokenizer's chat template. A text does so as the user's message if `chat`, or
    if there is a `system` message to put before it. template: further variables of the chat template.
    """

    tokenizer: Tokenizer
    chat: bool = False
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, question: str | Messages) -> tuple[IntArray, str]:
        """Tokens, int32 [P], and the text that they stand for.

        Raises `UserError` if the tokenizer has no chat template, `ValueError` for what is no conversation and
        for a prompt without tokens.
        """
        if isinstance(question, str) and not self.chat and self.system is None:
            text, special = question, True
        else:
            text = self._rendered(self._messages(question))
            special = False  # the template has written them
        try:
            tokens = self.tokenizer.encode(text, add_special_tokens=special)
        except (TypeError, UnicodeError) as error:  # what JSON's "\ud800" becomes
            raise ValueError("the text holds half a surrogate pair, which is no character") from error
        if not tokens:
            raise ValueError("the prompt is empty")
        return np.array(tokens, np.int32), text

    def _messages(self, question: str | Messages) -> list[dict[str, Any]]:
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        messages = [dict(message) for message in question]
        if not messages or not all(isinstance(message.get("role"), str) for message in messages):
            raise ValueError('a conversation is a list of {"role": …, "content": …}')
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer of this model has no chat template: give prompts as plain text, without data.chat and "
                "data.system, or use a model that was trained on chats"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.template
                )
            )
        except Exception as error:  # templates come with the model, and raise what their authors saw fit
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


def held_out(content: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out `fraction`: by its content alone, so in every run, file and order."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
