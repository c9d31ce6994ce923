"""The ranks of a trainer: joining them, sharding a model over them, and whole tensors from its shards.

One rank needs none of this in float32, nor in bfloat16 if the policy casts its parameters itself, and stays a plain
module. Otherwise FSDP2 shards every decoder layer, and the rest of the model as one more unit.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from miles_core.roles import TrainerContext
from miles_torch.model import Policy, layers


def device_of(context: TrainerContext) -> torch.device:
    """The rank's device. A rank that sees several GPUs takes the one of its number."""
    if not context.gpus:
        return torch.device("cpu")
    device = torch.device("cuda", context.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(context: TrainerContext) -> None:
    """Builds the default process group of the trainer's ranks; raises after the time limit if one stays away.

    A critic that shares the policy's ranks finds it there already.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if context.gpus else "gloo",
        init_method=context.address,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=context.timeout_s),
    )


def shard(policy: Policy, dtype: Literal["float32", "bfloat16"], device: torch.device) -> None:
    """Shards in place over all ranks; gradients are summed over them, in float32."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction


def reshard(policy: nn.Module) -> None:
    """After a forward pass that no backward pass follows: the root keeps its gathered parameters otherwise, and would
    not notice that the shards change."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, without gradient. A collective if it is sharded over several ranks."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if tensor.device_mesh.size() > 1 else tensor.to_local()


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, pattern: Tensor) -> Tensor:
    """`full` on the device of `pattern` and sharded as it is. Every rank has the same `full`; nothing is sent."""
    if not isinstance(pattern, DTensor):
        return full.to(pattern.device, copy=True)
    return distribute_tensor(
        full.to(pattern.to_local().device), pattern.device_mesh, pattern.placements, src_data_rank=None
    )
