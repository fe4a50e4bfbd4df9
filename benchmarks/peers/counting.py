"""Bytes that a peer sends through torch.distributed, counted where it calls it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Inside, bytes sent to other ranks by (verb, dtype). What else a peer calls is an error.

    For peers that look functions up in `torch.distributed` when they call them, on ranks that run
    nothing else.
    """
    sent: Counter[tuple[str, str]] = Counter()
    batch, all_to_all = dist.batch_isend_irecv, dist.all_to_all_single

    def counting_batch(ops):
        for op in ops:
            if op.op is dist.isend:
                sent["send", _dtype(op.tensor)] += op.tensor.numel() * op.tensor.element_size()
        return batch(ops)

    def counting_all_to_all(output, given, *args, group=None, **options):
        ranks = dist.get_world_size(group)
        count = given.numel() * given.element_size()
        sent["all_to_all", _dtype(given)] += count * (ranks - 1) // ranks
        return all_to_all(output, given, *args, group=group, **options)

    replaced = {name: _unexpected(name) for name in _OTHERS}
    replaced |= {
        "batch_isend_irecv": counting_batch,
        "all_to_all_single": counting_all_to_all,
    }
    before = {name: getattr(dist, name) for name in replaced}
    for name, function in replaced.items():
        setattr(dist, name, function)
    try:
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


#: Ways to send that no peer uses here; `isend` is named by batches and so must stay itself.
_OTHERS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "send",
)


def _unexpected(name: str):
    def refuse(*_args, **_options):
        raise AssertionError(f"a peer called torch.distributed.{name}, which is not counted")

    return refuse


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
