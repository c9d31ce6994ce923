"""Rollouts that core offers: how a prompt becomes samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from miles_core.errors import UserError
from miles_core.roles import RolloutContext
from miles_core.sample import Completion, Group, Prompt, Sample


class SingleTurn:
    """One prompt, one response a seed, everything the policy wrote is trained. Runs in the collector."""

    def __init__(self, options: None = None) -> None: ...

    async def run(self, prompt: Prompt, seeds: Sequence[int], context: RolloutContext) -> Group:
        """One sample per seed. Raises `UserError` if the prompt leaves no room for a response."""
        room = context.max_tokens - len(prompt.tokens)
        if room < 1:
            raise UserError(
                f"prompt {prompt.id} has {len(prompt.tokens)} tokens and leaves no room for a response in "
                f"model.max_tokens = {context.max_tokens}; raise it, or drop longer prompts in the data source"
            )
        sampling = replace(context.sampling, max_new_tokens=min(context.sampling.max_new_tokens, room))
        completions = await context.generate(prompt.tokens, seeds, sampling)
        return [
            sample_of(prompt, index, completion, context.tokenizer.decode(completion.tokens, skip_special_tokens=True))
            for index, completion in enumerate(completions)
        ]


def sample_of(prompt: Prompt, index: int, completion: Completion, text: str) -> Sample:
    """The sample of one completion of `prompt`; `text` is its response as the rewards shall see it."""
    return Sample(
        group=prompt.id,
        index=index,
        prompt=prompt.tokens,
        response=completion.tokens,
        mask=np.ones(len(completion.tokens), np.bool_),
        logprobs=completion.logprobs,
        versions=completion.versions,
        status=completion.status,
        text=text,
        answer=prompt.answer,
        metadata=prompt.metadata,
        routed_experts=completion.routed_experts,
    )
