"""Continuous batching, seeds, stops and limits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import (
    MAX_TOKENS,
    VOCABULARY,
    character_tokenizer,
    collect,
    generate,
    make_folder,
    make_model,
    prompts,
    publish,
    reference_logprobs,
    requests_of,
    running,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles_core.errors import UserError
from miles_core.sample import Completion, Request, Sampling
from miles_torch.stopping import StopRule, end_tokens

LENGTHS = (1, 3, 17, 8, 30)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def folder(tmp_path: Path, model: Any) -> Path:
    return make_folder(tmp_path / "model", model)


def ragged_requests(count: int, samples: int = 2) -> list[Request]:
    """Prompts and responses of different lengths, drawn in different ways."""
    return [
        Request(
            id=str(index),
            tokens=tokens,
            seeds=tuple(range(10 * index, 10 * index + samples)),
            sampling=Sampling(
                temperature=(0.7, 1.0, 0.0)[index % 3],
                top_p=(1.0, 0.9)[index % 2],
                max_new_tokens=LENGTHS[index % len(LENGTHS)],
            ),
        )
        for index, tokens in enumerate(prompts(count, seed=2))
    ]


def assert_agree(left: dict[str, list[Completion]], right: dict[str, list[Completion]]) -> None:
    """Equal tokens; log-probabilities may differ by what another order of adding up makes."""
    assert left.keys() == right.keys()
    for name, completions in left.items():
        for one, other in zip(completions, right[name], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.status == other.status
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 2, 5, 64])
def test_more_requests_than_slots_give_what_one_by_one_gives(slots: int, folder: Path, model: Any) -> None:
    requests = ragged_requests(9)
    alone: dict[str, list[Completion]] = {}

    async def run() -> None:
        async with running(folder, model) as engine:
            for request in requests:
                for seed in request.seeds:
                    one = Request(id="x", tokens=request.tokens, sampling=request.sampling, seeds=(seed,))
                    alone.setdefault(request.id, []).extend((await collect(engine, [one]))["x"])

    asyncio.run(run())
    assert_agree(generate(folder, model, requests, max_batch=slots), alone)


def test_with_common_head_widths_every_bit_comes_again_in_other_company(tmp_path: Path) -> None:
    model = make_model("qwen3-wide")
    folder = make_folder(tmp_path, model)
    requests = ragged_requests(9)
    together = generate(folder, model, requests, max_batch=7)
    for request in requests:
        alone = generate(folder, model, [request])[request.id]
        assert all(map(same, alone, together[request.id]))


def test_the_same_wave_gives_the_same_bits_whatever_the_engine_did_before(folder: Path, model: Any) -> None:
    requests = ragged_requests(12, samples=3)

    async def run() -> list[dict[str, list[Completion]]]:
        async with running(folder, model, max_batch=16) as engine:
            first = await collect(engine, requests)
            await collect(engine, requests_of(prompts(5, seed=9), Sampling(max_new_tokens=40), samples=2))
            return [first, await collect(engine, requests)]

    first, second = asyncio.run(run())
    fresh = generate(folder, model, requests, max_batch=16)
    for name, completions in first.items():
        assert all(map(same, completions, second[name]))
        assert all(map(same, completions, fresh[name]))


def test_seeds_reproduce_next_to_other_requests_that_come_later(folder: Path, model: Any) -> None:
    requests = ragged_requests(6)

    async def run() -> dict[str, list[Completion]]:
        async with running(folder, model, max_batch=7) as engine:
            others = requests_of(prompts(6, seed=4), Sampling(max_new_tokens=25), samples=2)
            renamed = [Request(id=f"o{each.id}", tokens=each.tokens, sampling=each.sampling) for each in others]
            mixed, _ = await asyncio.gather(collect(engine, requests), collect(engine, renamed))
            return mixed

    assert_agree(asyncio.run(run()), generate(folder, model, requests))


def test_completions_come_in_the_order_of_their_seeds(folder: Path, model: Any) -> None:
    tokens = prompts(1)[0]
    sampling = Sampling(max_new_tokens=10)
    forth = generate(folder, model, [Request(id="a", tokens=tokens, sampling=sampling, seeds=(1, 2, 3, 2))])["a"]
    back = generate(folder, model, [Request(id="a", tokens=tokens, sampling=sampling, seeds=(3, 2, 1))])["a"]
    assert [each.tokens.tolist() for each in back] == [forth[index].tokens.tolist() for index in (2, 1, 0)]
    assert forth[1].tokens.tolist() == forth[3].tokens.tolist() != forth[0].tokens.tolist()


def test_finished_requests_are_handed_out_while_others_generate(folder: Path, model: Any) -> None:
    short = Request(id="short", tokens=prompts(1)[0], sampling=Sampling(max_new_tokens=2))
    long = Request(id="long", tokens=prompts(1)[0], sampling=Sampling(max_new_tokens=40))

    async def run() -> list[str]:
        async with running(folder, model) as engine:
            return [name async for name, _ in engine.generate([long, short])]

    assert asyncio.run(run()) == ["short", "long"]


@pytest.mark.parametrize("slots", [3, 64])
def test_the_completions_of_a_request_share_one_prefill(slots: int, folder: Path, model: Any) -> None:
    requests = requests_of(prompts(3), Sampling(max_new_tokens=9), samples=4)
    computed: list[int] = []

    async def run() -> None:
        async with running(folder, model, max_batch=slots) as engine:
            assert engine._model is not None
            prefill = engine._model.prefill

            def counted(tokens: torch.Tensor, step: Any) -> torch.Tensor:
                computed.append(len(tokens))
                return prefill(tokens, step)

            engine._model.prefill = counted  # type: ignore[method-assign, assignment]
            await collect(engine, requests)

    asyncio.run(run())
    if slots == 64:
        assert computed == [sum(len(request.tokens) for request in requests)]
    else:  # with fewer slots than completions, a prompt is computed again once all its sequences have left
        assert sum(computed) <= 2 * sum(len(request.tokens) for request in requests)


def test_a_response_ends_at_a_stop_token_and_keeps_it(folder: Path, model: Any) -> None:
    request = Request(id="a", tokens=prompts(1)[0], sampling=Sampling(max_new_tokens=30), seeds=tuple(range(8)))
    free = generate(folder, model, [request])["a"]
    stop = int(free[0].tokens[7])
    sampling = Sampling(max_new_tokens=30, stop_token_ids=(stop, 95))
    stopped = generate(folder, model, [Request(id="a", tokens=request.tokens, sampling=sampling, seeds=request.seeds)])
    for before, after in zip(free, stopped["a"], strict=True):
        ends = [place for place, token in enumerate(before.tokens) if token in (stop, 95)]
        assert after.tokens.tolist() == before.tokens[: ends[0] + 1 if ends else 30].tolist()
        assert after.status == ("completed" if ends else "truncated")


def test_the_models_own_end_tokens_end_a_response(tmp_path: Path, model: Any) -> None:
    request = Request(id="a", tokens=prompts(1)[0], sampling=Sampling(max_new_tokens=30))
    free = generate(make_folder(tmp_path / "free", model), model, [request])["a"][0]
    end = int(free.tokens[11])
    folder = make_folder(tmp_path / "ending", model)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{end}]}}')
    ended = generate(folder, model, [request])["a"][0]
    assert ended.tokens.tolist() == free.tokens[: free.tokens.tolist().index(end) + 1].tolist()
    assert ended.status == "completed"


def test_end_tokens_are_those_of_all_the_places_that_name_them(folder: Path) -> None:
    tokenizer = character_tokenizer()
    assert end_tokens(folder, tokenizer) == frozenset()
    tokenizer.eos_token = "z"
    assert end_tokens(folder, tokenizer) == {ord("z") - 32}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert end_tokens(folder, tokenizer) == {3, 4, 5, ord("z") - 32}


def test_a_response_ends_at_a_stop_string_and_keeps_it(folder: Path, model: Any) -> None:
    tokenizer = character_tokenizer()
    request = Request(id="a", tokens=prompts(1)[0], sampling=Sampling(max_new_tokens=40))
    text = tokenizer.decode(generate(folder, model, [request])["a"][0].tokens)
    stop = text[20:23]
    sampling = Sampling(max_new_tokens=40, stop=("never there", stop))
    ended = generate(folder, model, [Request(id="a", tokens=request.tokens, sampling=sampling)])["a"][0]
    assert tokenizer.decode(ended.tokens) == text[: text.index(stop) + 3]
    assert ended.status == "completed"


def byte_tokenizer() -> Any:
    """One token for each byte, so that a character may need several, and pairs of some."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {letter: index for index, letter in enumerate(letters)} | {"ab": 256, "\u0120a": 257}
    inner = Tokenizer(models.BPE(names, [("a", "b"), ("\u0120", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, clean_up_tokenization_spaces=False
    )


BYTES = byte_tokenizer()
TEXTS = st.text(alphabet=st.sampled_from("ab é€😀\n"), max_size=25)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS, stops=st.lists(TEXTS.filter(bool).map(lambda text: text[:5]), min_size=1, max_size=3))
def test_a_stop_string_is_seen_with_the_token_that_completes_it(text: str, stops: list[str]) -> None:
    tokens = BYTES.encode(text)
    rule = StopRule(frozenset(), tuple(stops), BYTES)
    for count in range(1, len(tokens) + 1):
        whole = BYTES.decode(tokens[:count])
        assert rule.ends(tokens[:count]) == any(stop in whole for stop in stops)
        if rule.ends(tokens[:count]):
            break


def test_the_longest_sequence_caps_a_response(folder: Path, model: Any) -> None:
    longest, full = prompts(1)[0], np.arange(MAX_TOKENS - 1, dtype=np.int32)
    requests = [
        Request(id="long", tokens=longest, sampling=Sampling(max_new_tokens=1000)),
        Request(id="full", tokens=full, sampling=Sampling(max_new_tokens=1000)),
    ]
    answers = generate(folder, model, requests)
    assert len(answers["long"][0].tokens) == MAX_TOKENS - len(longest)
    assert len(answers["full"][0].tokens) == 1
    for request in requests:
        completion = answers[request.id][0]
        assert completion.status == "truncated"
        expected = reference_logprobs(model, request.tokens, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("tokens", "sampling", "seeds", "message"),
    [
        (np.zeros(MAX_TOKENS, np.int32), Sampling(), (0,), r"has 64 tokens, but with model.max_tokens = 64 at most 63"),
        (np.zeros(0, np.int32), Sampling(), (0,), "no prompt tokens"),
        (np.zeros(3, np.int32), Sampling(), (), "no seeds"),
        (np.array([VOCABULARY], np.int32), Sampling(), (0,), "outside the model's vocabulary of 96"),
        (np.array([-1], np.int32), Sampling(), (0,), "outside the model's vocabulary"),
        (np.zeros(3, np.int32), Sampling(stop=("x",)), (0,), "stop strings need a tokenizer"),
        (np.zeros(3, np.int32), Sampling(stop=("x", "")), (0,), "an empty stop string"),
    ],
)
def test_impossible_requests_are_refused_and_do_no_harm(
    tokens: Any, sampling: Sampling, seeds: tuple[int, ...], message: str, tmp_path: Path, model: Any
) -> None:
    async def run() -> None:
        async with running(make_folder(tmp_path, model, tokenizer=False), model) as engine:
            with pytest.raises(UserError, match=message):
                await collect(engine, [Request(id="bad", tokens=tokens, sampling=sampling, seeds=seeds)])
            assert await collect(engine, requests_of(prompts(1), Sampling(max_new_tokens=2)))

    asyncio.run(run())


def test_requests_wait_for_the_first_weights(folder: Path, model: Any) -> None:
    async def run() -> None:
        async with running(folder) as engine:
            assert engine.version == -1
            task = asyncio.create_task(collect(engine, requests_of(prompts(2), Sampling(max_new_tokens=3))))
            await asyncio.sleep(0.05)
            assert not task.done()
            assert engine.busy_seconds == 0
            publish(engine, model, 4)
            answers = await task
            assert engine.busy_seconds > 0
            assert all(each.versions.tolist() == [4, 4, 4] for (each,) in answers.values())

    asyncio.run(run())
