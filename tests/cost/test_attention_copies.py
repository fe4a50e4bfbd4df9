"""Copies around the kernels, held against what a rank's forward and backward really move."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stretto import axes
from stretto.cluster.model import Cluster
from stretto.cost.attention import kernel_of, kernel_seconds, pass_of
from stretto.cost.attention_bytes import Call
from stretto.cost.attention_copies import copies_of
from stretto.cost.attention_links import fabric_of
from stretto.mesh.local import LocalWorld
from stretto.ops.attention import backends
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.context import AttentionCase, Context, Gather
from stretto.plan.ranges import Mask

ROWS, HEADS, DIM, RANKS = 256, 4, 64, 2
CALL = Call(1, ROWS, ROWS, HEADS, HEADS, DIM, item_bytes=4)
BLOCK = CALL.q_block


class Moved(TorchDispatchMode):
    """Bytes that operations of this thread read and write, of tensors with a head dim.

    Kernels do not count, nor what the mesh copies: messages are bytes.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.is_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        is_message = any(x.dtype == torch.uint8 for x in tensors)
        if self.is_kernel or is_view or is_message or name.startswith(("empty", "new_empty")):
            return out
        # In-place sums: the target is read, and as the result written. A copy only writes there.
        read = tensors[1:] if name in ("copy_", "zero_", "fill_") else tensors
        self.bytes += sum(x.numel() * x.element_size() for x in read if x.numel() >= ROWS * DIM)
        return out


def moved(context, monkeypatch):
    """Blocks that rank 0 of two moves forward and backward, beside kernels.

    What a GPU does in one kernel of ours is left out: merges, delta and the stand-in.
    """
    seen = Moved()

    def silent(kernel):
        def call(*args, **kwargs):
            before, seen.is_kernel = seen.is_kernel, True
            try:
                return kernel(*args, **kwargs)
            finally:
                seen.is_kernel = before

        return call

    for name in ("merge_", "delta", "surrogate"):
        monkeypatch.setattr(backends, name, silent(getattr(backends, name)))
    cpu = backends.BACKENDS["cpu"]
    kernels = {"forward": silent(cpu.forward), "backward": silent(cpu.backward)}
    backend = dataclasses.replace(cpu, **kernels)
    found = []

    def rank(mesh):
        generator = torch.Generator().manual_seed(mesh.rank("cp"))
        q, k, v, dout = (
            torch.randn(1, ROWS, HEADS, DIM, generator=generator).transpose(1, 2) for _ in range(4)
        )
        case = AttentionCase.of(
            context,
            tokens=ROWS * RANKS,
            heads=(HEADS, HEADS),
            head_dim=DIM,
            item_bytes=4,
            mask=Mask(causal=True),
            rank=mesh.rank("cp"),
        )
        settings = {"mesh": mesh, "context": context, "case": case}
        if mesh.rank("cp"):
            backward_rank(dout, forward_rank(q, k, v, **settings)[2])
            return
        with seen:
            saved = forward_rank(q, k, v, **settings, backend=backend)[2]
            found.append(seen.bytes / BLOCK)
            backward_rank(dout, saved)
        found.append(seen.bytes / BLOCK - found[0])

    LocalWorld(context.sizes).run(rank)
    return found


def predicted(context, *, back):
    """Blocks around heads, and in all steps."""
    found = copies_of(context, CALL, context.ring, back=back)
    return found.heads / BLOCK, context.ring * found.step / BLOCK


def test_exchange_of_heads(monkeypatch):
    """Of two ranks: half of each tensor packed, half kept, half placed, read and written."""
    context = Context(ulysses=2)
    forward, backward = moved(context, monkeypatch)
    assert (forward, 0) == predicted(context, back=False) == (12, 0)
    stand_in = 2 + 2
    assert predicted(context, back=True) == (12 + stand_in, 0)
    assert backward == pytest.approx(12, abs=0.1)  # and one scalar per row and head


def test_sums_of_a_ring(monkeypatch):
    """A bound: of two zigzagged causal ranks the second step is half a block."""
    context = Context(ring=2)
    _, backward = moved(context, monkeypatch)
    heads, steps = predicted(context, back=True)
    assert (heads, steps) == (0, 2 + 3 + 2 * 4 + 2 * 3)
    assert 0.8 * steps < backward <= steps


def test_one_rank_copies_nothing():
    for back in (False, True):
        found = copies_of(Context(), CALL, 1, back=back)
        assert (found.heads, found.rows, found.step) == (0, 0, 0)


@pytest.mark.parametrize("context", [Context(ring=2, schedule=Gather()), Context(team=2)])
def test_one_column_still_merges_its_pieces(context):
    for back in (False, True):
        found = copies_of(context, CALL, 1, back=back)
        assert found.step > 0
        assert (found.rows > 0) == (context.team > 1)


def test_copies_add_to_seconds_at_the_devices_own_rate():
    cluster = Cluster.read("h100-x2-nccl")
    context, call = Context(ulysses=2), dataclasses.replace(CALL, item_bytes=2)
    kernels = kernel_seconds(context, call, kernel_of(cluster.device(0), "bf16"), [1e6], back=False)
    given = (context, call, kernels, fabric_of(cluster), axes.ordered(context.sizes))
    free = pass_of(*given, back=False)
    slow = pass_of(*given, back=False, copy_rate=1e9)
    assert slow.seconds - free.seconds == pytest.approx(12 * call.q_block / 1e9)
