"""What a rank does: one causal attention, forward and backward, by ours or a peer's code.

Each returns its results with the positions of their rows, and the bytes it sent, so that all are
judged alike. Tensors are (batch, heads, rows, head dim) when they leave a function here.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peers import stand_in
from peers.counting import counted
from stretto.mesh.count import CountingMesh
from stretto.mesh.mesh import Mesh
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.options import AttentionCase, Context
from stretto.plan.ranges import Mask

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Shape:
    """A causal call over all ranks: `rows` of each rank, query and key heads, bfloat16."""

    ranks: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.ranks * self.rows

    @property
    def block_bytes(self) -> int:
        """A rank's queries in bfloat16."""
        return 2 * self.rows * self.heads * self.head_dim

    def inputs(self) -> list[Tensor]:
        """q, k, v, dout of the whole sequence, (1, heads, tokens, head dim), from a fixed seed."""
        generator = torch.Generator().manual_seed(self.tokens + self.kv_heads)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(1, n, self.tokens, self.head_dim) for n in heads]
        return [torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes]


def ours(mesh: Mesh, shape: Shape, context: Context, repeats: int) -> dict[str, Any]:
    """Our plan on this rank."""
    rank, counting = mesh.rank("cp"), CountingMesh(mesh)
    case = AttentionCase.of(
        context,
        tokens=shape.tokens,
        heads=(shape.heads, shape.kv_heads),
        head_dim=shape.head_dim,
        mask=Mask(causal=True),
        rank=rank,
    )
    rows = torch.cat([torch.arange(first, end) for first, end in case.q_rows[rank]])
    q, k, v, dout = (x[:, :, rows] for x in shape.inputs())
    ms = []
    for _ in range(repeats):
        mesh.barrier()
        counting.traffic.lanes.clear()
        start = time.perf_counter()
        out, _, saved = forward_rank(q, k, v, mesh=counting, context=context, case=case)
        forward = dict(counting.traffic.lanes)
        dq, dk, dv = backward_rank(dout, saved)
        ms.append(1e3 * (time.perf_counter() - start))
    sent = Counter(counting.traffic.lanes)
    sent.subtract(forward)
    return {
        "rows": rows,
        "results": dict(zip(NAMES, (out, dq, dk, dv), strict=True)),
        "forward": sum(forward.values()),
        "gradients": sum(n for lane, n in sent.items() if lane.phase == "back-owner"),
        "backward": sum(sent.values()),
        "ms": ms,
    }


def ring_flash_attention(mesh: Mesh, shape: Shape, folder: str, repeats: int) -> dict[str, Any]:
    """zigzag_ring_flash_attn_func over all ranks."""
    prepare(folder)
    # The package's own __init__ wants the transformers library of another year.
    package = ModuleType("ring_flash_attn")
    package.__path__ = [str(Path(folder) / "ring_flash_attn")]
    sys.modules["ring_flash_attn"] = package
    zigzag = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    chunks = torch.arange(shape.tokens).chunk(2 * shape.ranks)
    rank = dist.get_rank()
    rows = torch.cat([chunks[rank], chunks[2 * shape.ranks - 1 - rank]])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return zigzag.zigzag_ring_flash_attn_func(q, k, v, causal=True)

    return peers_result(shape, rows, attend, repeats)


def usp(mesh: Mesh, shape: Shape, folder: str, repeats: int, ulysses: int = 1) -> dict[str, Any]:
    """LongContextAttention of yunchang: ulysses x ring, zigzag."""
    prepare(folder)
    yunchang = importlib.import_module("yunchang")
    kernels = importlib.import_module("yunchang.kernels")
    rank, ring = dist.get_rank(), shape.ranks // ulysses
    yunchang.set_seq_parallel_pg(ulysses, ring, rank, shape.ranks)
    layer = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=kernels.AttnType.FA)
    order = torch.arange(shape.tokens).view(1, -1, 1)
    rows = yunchang.EXTRACT_FUNC_DICT["zigzag"](order, rank, shape.ranks, ring, ulysses).view(-1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(q, k, v, causal=True)

    return peers_result(shape, rows, attend, repeats)


def prepare(folder: str) -> None:
    """Peers and the stand-in for flash-attn can be imported."""
    stand_in.provide()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def peers_result(shape: Shape, rows: Tensor, attend: Callable, repeats: int) -> dict[str, Any]:
    """Run a peer's function on (batch, rows, heads, head dim) and count what it sends.

    `gradients`: what backward sends in float32, which is dK and dV alone.
    """
    *whole, dout = (x[:, :, rows].transpose(1, 2).contiguous() for x in shape.inputs())
    ms = []
    for _ in range(repeats):
        leaves = [x.detach().requires_grad_() for x in whole]
        dist.barrier()
        start = time.perf_counter()
        with counted() as forward:
            out = attend(*leaves)
        with counted() as backward:
            out.backward(dout)
        ms.append(1e3 * (time.perf_counter() - start))
    results = (out.detach(), *(leaf.grad for leaf in leaves))
    return {
        "rows": rows,
        "results": dict(zip(NAMES, (x.transpose(1, 2) for x in results), strict=True)),
        "forward": sum(forward.values()),
        "gradients": backward["send", "float32"],
        "backward": sum(backward.values()),
        "ms": ms,
    }
