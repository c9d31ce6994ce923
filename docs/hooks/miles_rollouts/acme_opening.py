"""A rollout that writes the first words of each response itself, so that the policy goes on from there."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from miles_core import RolloutSpec, hookimpl


@hookimpl
def miles_rollouts() -> Iterable[RolloutSpec]:
    yield RolloutSpec(
        name="opening",
        ref="acme_opening:Opening",
        options="acme_opening:OpeningOptions",
        summary="The policy goes on from given first words, which are not trained",
    )


@dataclass(frozen=True, kw_only=True)
class OpeningOptions:
    """words: what every response begins with."""

    words: str = "Let me see."


class Opening:
    def __init__(self, options: OpeningOptions) -> None:
        self.words = options.words

    async def run(self, prompt, seeds, context):
        import numpy as np

        from miles_core.run.rollouts import sample_of

        words = np.array(context.tokenizer.encode(self.words, add_special_tokens=False), np.int32)
        start = np.concatenate([prompt.tokens, words])
        room = max(context.max_tokens - len(start), 1)
        sampling = replace(context.sampling, max_new_tokens=min(context.sampling.max_new_tokens, room))
        group = []
        for index, completion in enumerate(await context.generate(start, seeds, sampling)):
            text = context.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            sample = sample_of(prompt, index, completion, self.words + text)
            group.append(
                replace(
                    sample,
                    response=np.concatenate([words, sample.response]),
                    mask=np.concatenate([np.zeros(len(words), np.bool_), sample.mask]),  # ours, so not trained
                    logprobs=np.concatenate([np.zeros(len(words), np.float32), sample.logprobs]),
                    versions=np.concatenate([np.full(len(words), -1, np.int32), sample.versions]),
                )
            )
        return group
