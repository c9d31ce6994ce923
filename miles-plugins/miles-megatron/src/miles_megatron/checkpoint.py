"""Checkpoints of training, in Megatron's distributed format.

    dist/                 model, optimizer and reference, in Megatron's `torch_dist` format: any layout can load it
    record/               random.safetensors: random states, "<rank>/<name>"; trainer.json: counts of steps
    config.json, …        what stands beside the weights of the model, so that this is a model folder

The optimizer's state is stored parameter by parameter ("fully_reshardable"): Megatron's default cannot be saved, and
the other way fits only other numbers of data-parallel ranks. Keys do not depend on whether experts have an optimizer of
their own. Reading executes nothing: everything is loaded with `weights_only`, and PyTorch's own table of contents,
which is a pickle, is first read by an unpickler that knows nothing but the classes which belong there.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from miles_core.errors import RunError, UserError
from miles_core.roles import Written
from miles_core.run.weight_files import some
from miles_megatron.model import VALUE_HEAD, bare
from miles_torch.checkpoint import random_states, save_file

FOLDER = "dist"
"""The folder of the distributed format, in a checkpoint and in a model folder that was converted."""

_RECORD = "record"  # a folder: a model folder's own files would be weights by their names
_REFERENCE = "reference."


def metadata() -> dict[str, Any]:
    """How Megatron lays out a checkpoint's content."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


# ---- The distributed format --------------------------------------------------------------------------------------


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The model's part, sharded."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        name: bare(chunk).sharded_state_dict(metadata=metadata()) for name, chunk in zip(names, chunks, strict=True)
    }


def policy_tensors(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The model's part without what Transformer Engine adds (scales of fp8) and without a critic's head, which weights
    from elsewhere lack."""
    tensors, _ = extract_matching_values(
        model_state(chunks),
        lambda value: isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key != VALUE_HEAD,
    )
    found: dict[str, Any] = tensors
    return found


def content(copies: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {"copies": list(copies)}


def copies(folder: Path) -> list[str]:
    """Those that the Hugging Face folder held which the weights came from. Raises `UserError` for a damaged one."""
    _check_files(contents(folder), folder)
    with _careful(folder):
        found: list[str] = (dist_checkpointing.load_content_metadata(str(folder)) or {}).get("copies", [])
    return found


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def _careful(folder: Path) -> Iterator[None]:
    """What is loaded may execute nothing, though PyTorch's reader of distributed checkpoints would let the parts do so
    that are no tensors; and it does not remark that the common part is read by one process. Raises `UserError`."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:  # the latter is no `Exception`
        failures = error.failures if isinstance(error, CheckpointException) else {}  # the same on all ranks
        reason: Any = next((failure for failure, _ in failures.values()), error)
        if isinstance(reason, pickle.UnpicklingError):
            reason = "it holds something that is neither a tensor nor a plain value"
        raise UserError(f"{folder} cannot be loaded: {reason}") from None
    finally:
        del os.environ[_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before


_CONTENTS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip
"""Module -> what a table of contents is made of, beside PyTorch's types."""


class _Contents(pickle.Unpickler):
    """Knows nothing else, so that a file from anywhere cannot have anything called."""

    def find_class(self, module: str, name: str) -> Any:
        """Of what the pickle names."""
        known = name in _CONTENTS.get(module, ()) or (
            module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        )
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return super().find_class(module, name)


def contents(folder: Path) -> Metadata:
    """The table of contents. Raises `UserError` if it is damaged, or would have something executed."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            found = _Contents(file).load()
    except Exception as error:  # whatever a damaged pickle raises
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata):
        raise UserError(f"{path} is no table of contents of a checkpoint")
    return found


def types(folder: Path) -> dict[str, torch.dtype]:
    """Key of each tensor in a checkpoint -> its type. Raises `UserError` for a damaged one."""
    stored = contents(folder).state_dict_metadata
    return {key: one.properties.dtype for key, one in stored.items() if isinstance(one, TensorStorageMetadata)}


def optimizer_state(optimizer: Any, state: dict[str, Any], *, loading: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's part: what is sharded, which is stored, and the rest, which says how optimizers are arranged and
    so depends on the layout. state: of the model."""
    whole = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata())
    sharded, rest = extract_matching_values(whole, lambda value: isinstance(value, ShardedBase))
    return {"optimizer": sharded}, rest


def steps_taken(rest: Any) -> int:
    """Adam's count, from the optimizer's state that is not sharded; 0 if it has not stepped."""
    counts = []
    for groups in _param_groups(rest):
        counts.append(groups.get("state", {}).get("common_step"))
        counts += [group.get("step") for group in groups["param_groups"]]
    return max((int(count) for count in counts if count is not None), default=0)  # 0 of those without a parameter here


def put_optimizer(optimizer: Any, sharded: Any, rest: Any, steps: int) -> None:
    """Loads sharded state into an optimizer whose arrangement is `rest`."""
    for groups in _param_groups(rest):
        for group in groups["param_groups"]:
            group["step"] = steps
        if not optimizer.config.use_distributed_optimizer and steps:
            groups.setdefault("state", {})["common_step"] = torch.tensor(float(steps))
    merge(rest, sharded)
    optimizer.load_state_dict(rest)


def _param_groups(rest: Any) -> Iterator[dict[str, Any]]:
    """Every part that holds parameter groups, one for each of the optimizers."""
    if not isinstance(rest, dict):
        return
    if "param_groups" in rest:
        yield rest
    for part in rest.values():
        yield from _param_groups(part)


def reference_state(chunks: Sequence[nn.Module], tensors: Mapping[int, Tensor]) -> dict[str, Any]:
    """The reference's part: as the model's, with other tensors. tensors: address of a model's tensor
    -> the reference's."""

    def replaced(value: Any) -> Any:
        if isinstance(value, ShardedBase):
            value.key = f"{_REFERENCE}{value.key}"
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            value.data = tensors[value.data.data_ptr()].view(value.data.shape)
        return value

    return {f"{_REFERENCE}{name}": dict_list_map_inplace(replaced, part) for name, part in model_state(chunks).items()}


def write(
    state: dict[str, Any], folder: Path, options: Mapping[str, Any], copies: Sequence[str] = ()
) -> Written | None:
    """Writes sharded state, as the fields of `CheckpointConfig` in `options` say. A collective. Raises `RunError` if
    the disk refuses. None when it is written; with `async_save`, what says so: processes of Megatron's write a copy.

    copies: of the Hugging Face folder, see `Table`.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    background = bool(options.get("async_save", False))
    # Who writes says through a queue what stands where. Megatron has one in a process, so that of two checkpoints which
    # are being written, a policy's and its critic's, the first to be asked would get what the first to end has said.
    filesystem_async._results_queue = _manager().Queue()
    with _explained():
        request = dist_checkpointing.save(
            state,
            str(folder),
            validate_access_integrity=True,
            async_sharded_save=background,
            async_strategy="mcore",  # the other one needs a package of its own
            verify_integrity=bool(options.get("verify_integrity", False)),
            content_metadata=content(copies),
        )
    return _scheduled(request) if background else None


@functools.cache
def _manager() -> SyncManager:
    """Holds queues in a process of its own."""
    return multiprocessing.get_context("spawn").Manager()


@contextmanager
def _explained() -> Iterator[None]:
    """What a writing process ran into, as an error for people: PyTorch's is no `Exception`, and long."""
    try:
        yield
    except CheckpointException as failed:
        reasons = [f"rank {rank}: {error}" for rank, (error, _) in failed.failures.items()]
        raise RunError(
            f"the checkpoint could not be written; {'; '.join(reasons) or 'another rank says why'}"
        ) from None


def _scheduled(request: Any) -> Written:
    """Starts writing. The processes are forked: on a CPU what they write is not copied before, but on a write here."""
    queue = AsyncCallsQueue(persistent=False)
    queue.schedule_async_request(request)

    def written(wait: bool) -> bool:
        with _explained():
            queue.maybe_finalize_async_calls(blocking=wait)
        return not queue.async_calls

    return written


def read(state: dict[str, Any], folder: Path, options: Mapping[str, Any], *, partly: bool = False) -> dict[str, Any]:
    """Reads what sharded state asks for, under any layout. A collective. Raises `UserError` if it does not fit.

    options: fields of `CheckpointConfig`. partly: some layers of a model may be asked for without the others.
    """
    if not (folder / "metadata.json").is_file():
        raise UserError(f"{folder} holds no checkpoint in Megatron's distributed format")
    stored = contents(folder)
    _check_files(stored, folder)
    _check_keys(state, stored, folder)
    with _careful(folder):
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(
                state,
                str(folder),
                validate_access_integrity=not partly,
                strict=StrictHandling.RAISE_UNEXPECTED,
                verify_integrity=bool(options.get("verify_integrity", False)),
            )
        except (CheckpointingException, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} does not fit this run's model: {error}") from error
    return loaded


def _check_files(stored: Metadata, folder: Path) -> None:
    """Every file is there and as long as the table of contents says. Raises `UserError`; PyTorch would stop at the end
    of a shorter one without a word."""
    ends: dict[str, int] = {}
    for part in stored.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks the file {name}: the checkpoint is incomplete")
        if (size := path.stat().st_size) < end:
            raise UserError(f"{path} is damaged or incomplete: it has {size} bytes of {end}")


def _check_keys(state: dict[str, Any], stored: Metadata, folder: Path) -> None:
    """Everything asked for is there, or all ranks raise `UserError`. A collective. Megatron would list all keys."""
    asked, _ = extract_matching_values(state, lambda value: isinstance(value, ShardedTensor | ShardedTensorFactory))
    own: set[str] = set()
    dict_list_map_inplace(lambda value: own.add(value.key), asked)
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    if missing := sorted(set().union(*everywhere) - stored.state_dict_metadata.keys()):
        raise UserError(
            f"{folder} lacks {some(missing)}, which this run's model asks for: the checkpoint is of another model, or "
            "of a run with other parts"
        )


def put_model(chunks: Sequence[nn.Module], loaded: Mapping[str, Any], *, tensors_only: bool = False) -> None:
    """Copies what `read` gave into the model; of `policy_tensors`, if `tensors_only`."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    for name, chunk in zip(names, chunks, strict=True):
        bare(chunk).load_state_dict(loaded[name], strict=not tensors_only)


# ---- Beside it -----------------------------------------------------------------------------------------------------


def _own_random() -> dict[str, Tensor]:
    tracked = {f"tracker/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return {**random_states(), **{name: state.cpu() for name, state in tracked.items()}}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Random states of all ranks and the record. A collective; rank 0 writes. Raises `OSError`."""
    states: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, _own_random())
    if dist.get_rank() == 0:
        folder = folder / _RECORD
        folder.mkdir()
        flat = {f"{rank}/{name}": state for rank, own in enumerate(states) for name, state in own.items()}
        save_file(flat, folder / "random.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"format": 1, **record}) + "\n", encoding="utf-8")


def read_record(folder: Path, stage: str) -> dict[str, Any]:
    """The record, after setting this rank's random states. Raises `UserError` for another stage's."""
    from safetensors import safe_open

    folder = folder / _RECORD
    record: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if record["stage"] != stage:
        raise UserError(f"{folder} was saved in stage {record['stage']!r}, not {stage!r}.")
    with safe_open(folder / "random.safetensors", framework="pt") as file:
        prefix = f"{dist.get_rank()}/"
        own = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    _set_random(own)
    return record


def _set_random(states: Mapping[str, Tensor]) -> None:
    """A rank that the checkpoint does not know keeps the states it has."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix("tracker/"): s for name, s in states.items() if name.startswith("tracker/")}
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
