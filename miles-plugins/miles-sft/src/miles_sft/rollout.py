"""The rollout of supervised fine-tuning: nothing is generated, the data has the responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_core.errors import UserError
from miles_core.roles import RolloutContext
from miles_core.sample import Group, Prompt, Sample


class Supervised:
    """The response is the tokenised `Prompt.answer` and the tokenizer's end-of-sequence token, all of it trained.

    Log-probabilities are 0 and versions -1, because no policy wrote it. A response that does not fit into
    `model.max_tokens` is cut there and has status "truncated". Seeds make no difference: every sample is the same.
    """

    def __init__(self, options: None) -> None:
        del options

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: RolloutContext) -> Group:
        """One sample per seed. Raises UserError for a prompt without answer or a tokenizer without end token."""
        if prompt.answer is None:
            raise UserError(
                f'prompt {prompt.id} has no answer, and the rollout "supervised" trains on answers: '
                "name the field that holds them in the data section, or take another rollout"
            )
        end = context.tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no end-of-sequence token, which must end each supervised response")
        whole = [*context.tokenizer.encode(prompt.answer, add_special_tokens=False), end]
        response = np.array(whole[: max(context.max_tokens - len(prompt.tokens), 0)], np.int32)
        return [
            Sample(
                group=prompt.id,
                index=index,
                prompt=prompt.tokens,
                response=response,
                mask=np.ones(len(response), np.bool_),
                logprobs=np.zeros(len(response), np.float32),
                versions=np.full(len(response), -1, np.int32),
                status="completed" if len(response) == len(whole) else "truncated",
                text=prompt.answer,
                answer=prompt.answer,
                metadata=prompt.metadata,
            )
            for index in range(len(seeds))
        ]
