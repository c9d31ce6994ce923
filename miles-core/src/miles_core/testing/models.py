"""A tiny model with random weights, and what transformers and plain PyTorch say about it: the kits' reference.

Everything here needs PyTorch and transformers, and imports them when it is called.

Shapes: P prompt tokens and R response tokens of one sequence; N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from miles_core.roles import EngineContext, TrainerContext
from miles_core.sample import Batch
from miles_core.testing.subject import skip

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 61
"""Small enough for every token to be probable, and no round number."""

TINY: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Fields of config.json that make a decoder tiny."""


def gpus_for(devices: frozenset[str]) -> int:
    """How many GPUs a component that runs on `devices` takes here: none if it runs on a CPU, else one."""
    import torch

    if "cpu" in devices:
        return 0
    if "cuda" not in devices or not torch.cuda.is_available():
        skip(f"it runs on {' or '.join(sorted(devices))}, which is not here")
    return 1


def make_model(seed: int = 0, **changes: Any) -> Any:
    """A Qwen3 of transformers in float32 whose distributions are far from uniform, so that mistakes show."""
    import torch
    from transformers import Qwen3Config

    config = Qwen3Config(**{**TINY, "head_dim": 8, "architectures": ["Qwen3ForCausalLM"], **changes})
    return randomised(config, torch.Generator().manual_seed(seed))


def randomised(config: Any, generator: Any) -> Any:
    """The causal language model of a transformers config, with weights that are large enough for mistakes to show."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def save_model(model: Any, folder: Path) -> Path:
    """A Hugging Face folder: config, weights as safetensors, and a tokenizer."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    _save_tokenizer(folder, model.config.get_text_config().vocab_size)
    return folder


def model_folder(folder: Path) -> Path:
    """The Hugging Face folder `folder`/model with `make_model()`."""
    path = folder / "model"
    if not path.exists():
        path.mkdir()
        for name, content in _files().items():
            (path / name).write_bytes(content)
    return path


@cache
def _files() -> Mapping[str, bytes]:
    """Of that folder: nearly every rule needs one of its own, and transformers takes its time to write it."""
    with TemporaryDirectory(prefix="miles-model-") as folder:
        return {path.name: path.read_bytes() for path in save_model(make_model(), Path(folder)).iterdir()}


def _save_tokenizer(folder: Path, size: int) -> None:
    """A word a token: "1 17 4"; there is no end token, so that nothing ends before its time."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(token): token for token in range(size)}, unk_token="0"))  # noqa: S106 — a token, no password
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)  # type: ignore[no-untyped-call]


def weights_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by their Hugging Face names, tied ones once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def response_logprobs(
    model: Any, prompt: NDArray[np.int32], response: NDArray[np.int32], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of a response by one forward pass of transformers' own, float32 [R]."""
    import torch

    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    table: Tensor = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])
    return table[:, 0]


def batch_logprobs(model: Any, batch: Batch) -> Tensor:
    """Token column [N] with gradient, 0 where masked: each sample by itself through transformers' own forward."""
    import torch

    columns = []
    for sample in range(len(batch)):
        place = slice(int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1]))
        tokens = torch.from_numpy(batch["tokens"][place].astype(np.int64))
        mask = torch.from_numpy(batch["mask"][place])
        table = (model(tokens[None]).logits[0, :-1].float() / batch.temperature).log_softmax(-1)
        picked = table.gather(1, tokens[1:, None])[:, 0]
        columns.append(torch.cat([picked.new_zeros(1), picked]) * mask)
    return torch.cat(columns)


def batch_top_logprobs(model: Any, batch: Batch) -> Tensor:
    """The same of `teacher_top_tokens`, [N, K]; 0 at each sample's first token."""
    import torch

    columns = []
    for sample in range(len(batch)):
        place = slice(int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1]))
        tokens, top = (
            torch.from_numpy(batch[name][place].astype(np.int64)) for name in ("tokens", "teacher_top_tokens")
        )
        table = (model(tokens[None]).logits[0, :-1].float() / batch.temperature).log_softmax(-1)
        columns.append(torch.cat([table.new_zeros(1, top.shape[1]), table.gather(1, top[1:])]))
    return torch.cat(columns)


def engine_context(
    model: Path,
    gpus: int,
    *,
    folder: Path,
    index: int = 0,
    max_tokens: int = 320,
    hooks: Any = None,
    frozen: bool = False,
) -> EngineContext:
    """An engine of one thread or one GPU."""
    return EngineContext(
        model=model,
        index=index,
        gpus=gpus,
        threads=1,
        dtype="float32",
        max_tokens=max_tokens,
        seed=0,
        folder=folder,
        hooks=hooks,
        frozen=frozen,
    )


def trainer_context(model: Path, gpus: int, *, reference: bool = False, hooks: Any = None) -> TrainerContext:
    """A trainer of one rank, on one thread or one GPU."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return TrainerContext(
        model=model,
        rank=0,
        world_size=1,
        address=f"tcp://127.0.0.1:{port}",
        gpus=gpus,
        threads=1,
        seed=7,
        reference=reference,
        timeout_s=60,
        hooks=hooks,
    )
