"""A whole sequence through a plan on virtual ranks, put together again, and what naive says."""

import functools
from dataclasses import dataclass, field

import torch

from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalWorld
from stretto.ops.attention import naive
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.context import AttentionCase
from stretto.plan.ranges import FULL
from stretto.testing.close import assert_close

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Inputs:
    """Seeded q, k, v and dout of a whole sequence, and the mask."""

    tokens: int
    kv_tokens: int | None = None
    heads: tuple[int, int] = (4, 4)
    head_dim: int = 8
    batch: int = 1
    mask: object = FULL
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @functools.cached_property
    def tensors(self):
        """q, k, v, dout: (B, heads, rows, D)."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = (self.tokens, self.kv_rows, self.kv_rows, self.tokens)
        heads = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        return tuple(
            torch.randn(
                self.batch, h, n, self.head_dim, generator=generator, dtype=torch.float64
            ).to(self.dtype)
            for h, n in zip(heads, rows, strict=True)
        )

    @property
    def kv_rows(self):
        return self.tokens if self.kv_tokens is None else self.kv_tokens

    @functools.cached_property
    def expected(self):
        """out, lse, dq, dk, dv of one device, written out."""
        return self.on_one_device(self.dtype)

    @functools.cached_property
    def exact(self):
        """The same in float64."""
        return self.expected if self.dtype == torch.float64 else self.on_one_device(torch.float64)

    def on_one_device(self, dtype):
        q, k, v, dout = (x.to(dtype) for x in self.tensors)
        visible = None
        if self.mask != FULL:
            sees = self.mask.sees
            table = [[sees(i, j) for j in range(self.kv_rows)] for i in range(self.tokens)]
            visible = torch.tensor(table, dtype=torch.bool).view(self.tokens, self.kv_rows)
        out, lse = naive.attention(q, k, v, visible)
        return (out, lse, *naive.attention_backward(dout, q, k, v, visible))

    def case(self, context, *, return_lse=True):
        return AttentionCase.of(
            context,
            tokens=self.tokens,
            kv_tokens=self.kv_tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            batch=self.batch,
            item_bytes=self.dtype.itemsize,
            mask=self.mask,
            return_lse=return_lse,
        )


@dataclass
class Whole:
    """What all ranks made together, in order of position, and what each of them sent."""

    results: tuple
    traffic: dict = field(default_factory=dict)
    declared: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)

    def assert_close(self, inputs):
        """As near to the truth as one device is, three times that at most; float64: 1e-12."""
        bases = inputs.expected
        for name, got, base, ref in zip(NAMES, self.results, bases, inputs.exact, strict=True):
            assert_close(got, base, ref, factor=3.0, what=name)

    def assert_bytes(self):
        """As declared; and all ranks take part in everything, as communicators need it."""
        assert self.traffic == self.declared
        assert all(calls == self.calls[0] for calls in self.calls)


def indices(rows):
    """Global positions of a rank's rows."""
    return torch.tensor([p for a, b in rows for p in range(a, b)], dtype=torch.long)


def run_whole(context, inputs, *, sizes=None, backend="auto", return_lse=True):
    """Forward and backward of `inputs` through `context` on virtual ranks."""
    case = inputs.case(context, return_lse=return_lse)
    q_at, k_at = map(indices, case.q_rows), map(indices, case.kv_rows)
    q_at, k_at = list(q_at), list(k_at)

    def body(mesh):
        counting = CountingMesh(mesh)
        rank = mesh.rank("cp")
        job = {"mesh": counting, "context": context, "case": case.at(rank), "backend": backend}
        found = part(inputs, q_at[rank], k_at[rank], **job)
        return rank, found, (counting.traffic, counting.calls)

    parts = LocalWorld(sizes or context.sizes, timeout_s=60).run(body)
    return joined(context, case, parts, q_at, k_at)


def part(inputs, q_at, k_at, **job):
    """One rank's out, lse, dq, dk, dv."""
    q, k, v, dout = inputs.tensors
    local = (q[:, :, q_at], k[:, :, k_at], v[:, :, k_at])
    out, lse, saved = forward_rank(*local, **job)
    return (out, lse, *backward_rank(dout[:, :, q_at], saved))


def joined(context, case, parts, q_at, k_at):
    """Every rank's (rank, tensors, traffic) as a whole."""
    by_rank = {rank: found for rank, found, _ in parts}
    whole = []
    for number, name in enumerate(NAMES):
        places = torch.cat(k_at if name in ("dk", "dv") else q_at)
        pieces = [by_rank[rank][number] for rank in range(len(by_rank))]
        if pieces[0] is None:
            whole.append(None)
            continue
        together = torch.cat(pieces, dim=2)
        ordered = torch.empty_like(together)
        ordered[:, :, places] = together
        whole.append(ordered)
    traffic = {rank: sent for rank, _, (sent, _) in parts}
    declared = {rank: context.wire(case.at(rank)) for rank in traffic}
    return Whole(tuple(whole), traffic, declared, [calls for _, _, (_, calls) in parts])
