"""Log-probabilities and entropy over a divided vocabulary against PyTorch's own softmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_kit import run_functions

from miles_megatron import head
from miles_megatron.head import token_logprobs

VOCABULARY, PADDED = 61, 64


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight with padding that must not count, targets, and weights of the objective."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator)
    weight = torch.randn(PADDED, 16, generator=generator)
    targets = torch.randint(0, VOCABULARY, (7,), generator=generator)
    return hidden, weight, targets, torch.randn(2, 7, generator=generator)


def expected(temperature: float) -> list[torch.Tensor]:
    """Log-probabilities, entropies, and the gradients by hidden states and weight."""
    hidden, weight, targets, scale = case()
    hidden.requires_grad_()
    weight.requires_grad_()
    table = (hidden @ weight[:VOCABULARY].t() / temperature).log_softmax(-1)
    logprobs, entropy = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (scale[0] * logprobs + scale[1] * entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprobs, entropy, hidden.grad, weight.grad]


def computed(temperature: float, group: object = None, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
    """The same by a rank of several, the gradient by hidden states still to be summed over them."""
    hidden, weight, targets, scale = case()
    own = weight.chunk(ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden, own, targets, vocabulary=VOCABULARY, temperature=temperature, entropy=True, group=group
    )
    assert entropy is not None
    (scale[0] * logprobs + scale[1] * entropy).sum().backward()
    assert hidden.grad is not None
    assert own.grad is not None
    return [logprobs.detach(), entropy.detach(), hidden.grad, own.grad]


def top_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Three tokens at each place, of which two are the same, and weights of the objective; each [T, 3]."""
    _, _, targets, scale = case()
    return torch.stack([targets, (targets + 5) % VOCABULARY, targets], 1), torch.stack([*scale, scale[0] * scale[1]], 1)


def several_expected() -> list[torch.Tensor]:
    """Log-probabilities of these, and the gradients by hidden states and weight."""
    hidden, weight, _, _ = case()
    hidden.requires_grad_()
    weight.requires_grad_()
    targets, scale = top_case()
    logprobs = (hidden @ weight[:VOCABULARY].t() / 0.7).log_softmax(-1).gather(1, targets)
    (logprobs * scale).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprobs.detach(), hidden.grad, weight.grad]


def several(group: object = None, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
    """The same by a rank of several."""
    hidden, weight, _, _ = case()
    own = weight.chunk(ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    targets, scale = top_case()
    logprobs, _ = token_logprobs(hidden, own, targets, vocabulary=VOCABULARY, temperature=0.7, group=group)
    (logprobs * scale).sum().backward()
    assert hidden.grad is not None
    assert own.grad is not None
    return [logprobs.detach(), hidden.grad, own.grad]


def on_two_ranks(rank: int) -> list[list[torch.Tensor]]:
    """What each of two ranks computes."""
    import torch.distributed as dist

    found = computed(0.7, dist.group.WORLD, rank, 2) + several(dist.group.WORLD, rank, 2)
    gathered: list[list[torch.Tensor]] = [[], []]
    dist.all_gather_object(gathered, found)
    return gathered


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("limits", [(2**28, 2**24), (0, 2 * PADDED)], ids=["kept", "made-again-in-chunks"])
def test_values_and_gradients_are_those_of_log_softmax(
    temperature: float, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.LIMITS, "cpu", head.Limits(*limits))
    for own, reference in zip(computed(temperature), expected(temperature), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


def test_ranks_that_share_the_vocabulary_agree_with_log_softmax(tmp_path: Path) -> None:
    first, second = run_functions(tmp_path, 2, "test_head:on_two_ranks")
    logprobs, entropy, hidden, weight = expected(0.7)
    for rank in (first, second):
        torch.testing.assert_close(rank[0], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank[1], entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[2] + second[2], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), weight, rtol=1e-5, atol=1e-5)
    top, hidden, weight = several_expected()
    torch.testing.assert_close(first[4], top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[5] + second[5], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first[6], second[6]]), weight, rtol=1e-5, atol=1e-5)


def test_several_tokens_at_a_place_are_those_of_log_softmax_and_one_that_comes_twice_counts_twice() -> None:
    for own, reference in zip(several(), several_expected(), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


def test_no_token_is_fine_and_logits_in_bfloat16_are_summed_in_float32() -> None:
    hidden, weight, targets, _ = case()
    none, _ = token_logprobs(hidden[:0], weight, targets[:0], vocabulary=VOCABULARY)
    assert none.shape == (0,)
    half, _ = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, vocabulary=VOCABULARY)
    logits = (hidden.bfloat16() @ weight.bfloat16().t())[:, :VOCABULARY].float()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
