"""Weights in shards: which modules are sharded, how they get their first values, gradient norm.

Gradients are summed, never averaged: a loss is a sum over this rank's tokens divided by the number
of tokens of all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stretto.mesh.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: What parameters are stored in, by the dtype of the run: bfloat16 computes on float32 masters.
STORED = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float64": torch.float64,
}


#: Weights of at most this many bytes stay gathered through a step, and their gradients are summed
#: once in it: the memory is small, and so would the messages of every micro-batch be.
SMALL_BYTES = 256 * 2**20


def sharded(mesh: Mesh, dtype: str) -> bool:
    """Whether weights go through torch's engine: bfloat16 copies of float32 masters are its work.

    One rank in a full dtype trains the plain module, which no engine slows down.
    """
    return mesh.world_size > 1 or dtype == "bfloat16"


def shard(model: nn.Module, over: DeviceMesh, dtype: str) -> None:
    """Shard every block and what is left over the ranks of `over`, in place.

    A rank gathers a block's weights when it is needed and frees them after it; small models are
    gathered once per step.
    """
    keep = is_small(model)
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        # Rotary angles are float32 inputs of a block and must stay so.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in blocks(model):
        fully_shard(block, mesh=over, mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(model, mesh=over, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # On every module: set on the root alone, nested gradients stay averaged, and Adam,
            # which does not see a factor, hides that. Sums, since gloo has no scaled reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_small(model: nn.Module) -> bool:
    """Whether all weights together may stay gathered."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) <= SMALL_BYTES


def between(model: nn.Module, *, last: bool) -> None:
    """Before a micro-batch of a small model: only after the last are gradients summed over ranks.

    Until then they add up in the dtype in which they are summed.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Free gathered weights; a forward without a backward leaves those of the root in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a transformer: items of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its memory and its first values, shard by shard.

    One that has weights, as transformers draws them, only moves.
    Each parameter is drawn whole from a generator of its own, so a value depends on seed and name
    alone, and no rank ever holds more than one whole parameter beside its shards.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(device)
        return
    initial: Any = getattr(model, "initial", None)
    assert initial is not None, f"{type(model).__name__} states no first values"
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial(name, parameter.shape, _generator(seed, name))
            local(parameter).copy_(part_of(whole, parameter))


def _generator(seed: int, name: str) -> torch.Generator:
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


def part_of(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter that is sharded along dim 0."""
    if not isinstance(parameter, DTensor):
        return whole
    over = parameter.device_mesh
    chunks = whole.chunk(over.size(), 0)
    position = over.get_local_rank()
    return chunks[position] if position < len(chunks) else whole[:0]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, sharing memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """This rank's shards of all gradients there are, sharing memory."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def total(values: Sequence[torch.Tensor | float], mesh: Mesh) -> list[float]:
    """Sums over all ranks of a few numbers, in float64 and in one message.

    Plain c10d: functional collectives on CUDA tensors over gloo end the process.
    """
    # The dtype at once: a Python float would pass through float32.
    parts = [torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values]
    mine = torch.stack(parts)
    if mesh.world_size > 1:
        mine = mesh.all_reduce(mine, None, "control").wait()
    return mine.tolist()


def square_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of all elements of some shards, in float64."""
    norms = torch._foreach_norm([part for part in parts if part.numel()])
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in norms]).square().sum()
