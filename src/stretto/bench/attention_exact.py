"""One plan and one call on ranks: results against one device, bytes against what is declared.

Ranks are threads of one process (LocalMesh) or processes over gloo; both return the same pieces,
so both are judged by the same code and compared bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stretto.bench.attention_cases import Call, Reference, errors, reference, rows_of
from stretto.cost import attention_bytes
from stretto.errors import StrettoError
from stretto.mesh.count import CountingMesh
from stretto.mesh.join import init_mesh
from stretto.mesh.local import LocalWorld
from stretto.mesh.mesh import Mesh
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.plan.options import AttentionCase, Context
from stretto.plan.schedule import schedule
from stretto.testing.ranks import Axes

#: Largest error of float64 against one device, relative to the largest value where above 1.
MOST_ERROR = 1e-12

Piece = dict[str, Any]
Job = tuple[str, Context, Call]


def piece(mesh: Mesh, context: Context, call: Call) -> Piece:
    """A rank's results and the bytes that it sent, in storage that can be pickled."""
    counting, rank = CountingMesh(mesh), mesh.rank("cp")
    case, known = call.of(context).at(rank), reference(call)
    rows, kv_rows = rows_of(case.q_rows[rank]), rows_of(case.kv_rows[rank])
    out, lse, saved = forward_rank(
        known.q[:, :, rows],
        known.k[:, :, kv_rows],
        known.v[:, :, kv_rows],
        mesh=counting if context.degree > 1 else None,
        context=context,
        case=case,
    )
    forward = dict(counting.traffic.lanes)
    dq, dk, dv = backward_rank(known.dout[:, :, rows], saved)
    sent = Counter(counting.traffic.lanes)
    sent.subtract(forward)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {
        "rank": rank,
        **{name: _plain(value) for name, value in results.items()},
        "forward": {tuple(lane): count for lane, count in forward.items()},
        "backward": {tuple(lane): count for lane, count in sent.items() if count},
    }


def _plain(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, "calls here ask for the log-sum-exp"
    return value.detach().contiguous()


def on_threads(context: Context, call: Call) -> list[Piece]:
    """Pieces of virtual ranks in this process, in order of the logical index."""
    return in_order(LocalWorld(context.sizes).run(lambda mesh: piece(mesh, context, call)))


def in_order(found: Sequence[Piece]) -> list[Piece]:
    """By logical index: on a mesh of two levels ranks are numbered otherwise."""
    return sorted(found, key=lambda own: own["rank"])


def on_ranks(mesh: Mesh, jobs: Sequence[Job]) -> list[Piece]:
    """Body of a gloo rank: its piece of every job, each over a mesh of its own."""
    found = []
    for _, context, call in jobs:
        own = init_mesh(Axes(context.sizes), device="cpu", timeout_s=mesh.timeout_s)
        try:
            found.append(piece(own, context, call))
        finally:
            own.close()
    return found


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes sent by the rank that sends most, and what they were compared with.

    `declared`: equal to the plan's own on every rank, phase, verb and axis. `closed`: equal to
    the closed form per phase and axis; None where ranks differ and there is none.
    """

    forward: int
    backward: int
    declared: bool
    closed: bool | None


def judged(name: str, context: Context, call: Call, found: Sequence[Piece], carrier: str) -> dict:
    """The row of a plan and a call: errors, bytes, and whether both are as they must be."""
    case, known = call.of(context), reference(call)
    apart, sent = errors(found, case, known), bytes_of(context, case, call, found)
    row = _row(name, context, call, carrier)
    row["max_err"] = max(apart.values())
    row |= {
        "steps": sum(1 for _ in schedule(context, case).forward.steps),
        "forward_bytes": sent.forward,
        "backward_bytes": sent.backward,
        "bytes_declared": sent.declared,
        "bytes_closed": sent.closed,
    }
    row["right"] = row["max_err"] <= MOST_ERROR and sent.declared and sent.closed is not False
    return row if row["right"] else row | {"wrong": _complaint(apart, sent)}


def _complaint(apart: Mapping[str, float], sent: Bytes) -> str:
    """What of a row is not as it must be."""
    words = [f"{name} off by {error:.1e}" for name, error in apart.items() if error > MOST_ERROR]
    words += ["bytes differ from the plan's own"] * (not sent.declared)
    words += ["bytes differ from the closed form"] * (sent.closed is False)
    return ", ".join(words)


def failed(name: str, context: Context, call: Call, carrier: str, error: Exception) -> dict:
    """The row of a call that raised."""
    row = _row(name, context, call, carrier)
    return row | {"max_err": None, "right": False, "wrong": f"{type(error).__name__}: {error}"}


def _row(name: str, context: Context, call: Call, carrier: str) -> dict[str, Any]:
    return {
        "part": "exact",
        "carrier": carrier,
        "ranks": context.degree,
        "plan": name,
        "ulysses": context.ulysses,
        "case": call.name,
    }


def bytes_of(context: Context, case: AttentionCase, call: Call, found: Sequence[Piece]) -> Bytes:
    """Counted bytes against the plan's own and the closed form; integers, exactly."""
    totals = [tuple(sum(own[way].values()) for way in ("forward", "backward")) for own in found]
    declared = all(
        _lanes(context, case.at(rank), way) == own[way]
        for rank, own in enumerate(found)
        for way in ("forward", "backward")
    )
    return Bytes(
        forward=max(total[0] for total in totals),
        backward=max(total[1] for total in totals),
        declared=declared,
        closed=closed(context, case, call, found) if call.plain else None,
    )


def _lanes(context: Context, case: AttentionCase, way: str) -> dict[tuple, int]:
    return {tuple(lane): count for lane, count in context.wire(case, (way,)) if count}


def closed(context: Context, case: AttentionCase, call: Call, found: Sequence[Piece]) -> bool:
    """Whether the rank that sends most sends what the formulas say, per phase and axis."""
    rows = call.tokens // call.ranks
    shape = (*call.heads, case.head_dim, case.item_bytes, case.stat_bytes)
    one = attention_bytes.Call(call.batch, rows, rows, *shape, case.return_lse)
    for way in ("forward", "backward"):
        most: Counter[tuple[str, str]] = Counter()
        for own in found:
            most |= _by_phase(own[way])
        terms = attention_bytes.terms(context, one, back=way == "backward")
        if dict(most) != attention_bytes.by_phase(terms, context):
            return False
    return True


def _by_phase(lanes: Mapping[tuple, int]) -> Counter[tuple[str, str]]:
    sums: Counter[tuple[str, str]] = Counter()
    for (phase, _, axis), count in lanes.items():
        sums[phase, axis] += count
    return sums


def local_rows(jobs: Sequence[Job]) -> list[dict]:
    """Rows of some jobs on threads; a job that raises becomes a row that says so."""
    torch.set_num_threads(1)
    rows = []
    for name, context, call in jobs:
        try:
            rows.append(judged(name, context, call, on_threads(context, call), "threads"))
        except (StrettoError, RuntimeError, AssertionError) as error:
            rows.append(failed(name, context, call, "threads", error))
    return rows


def same_bits(ours: Sequence[Piece], theirs: Sequence[Piece]) -> bool:
    """Whether every result of every rank is equal to the last bit, and every byte counted."""
    for one, other in zip(ours, theirs, strict=True):
        if any(
            not torch.equal(one[name], other[name]) for name in ("out", "lse", "dq", "dk", "dv")
        ):
            return False
        if any(one[way] != other[way] for way in ("forward", "backward")):
            return False
    return True


# ---- gradcheck ---------------------------------------------------------------------------------


class _Whole(torch.autograd.Function):
    """A whole call on virtual ranks as one differentiable function, for numerical gradients."""

    @staticmethod
    def forward(ctx, q, k, v, context, call):
        case = call.of(context)

        def body(mesh: Mesh):
            rank = mesh.rank("cp")
            rows, kv_rows = rows_of(case.q_rows[rank]), rows_of(case.kv_rows[rank])
            local = (q[:, :, rows], k[:, :, kv_rows], v[:, :, kv_rows])
            own, _, saved = forward_rank(*local, mesh=mesh, context=context, case=case.at(rank))
            return rank, own, saved

        found = LocalWorld(context.sizes).run(body)
        out = torch.zeros_like(q)
        for rank, own, _ in found:
            out[:, :, rows_of(case.q_rows[rank])] = own
        saved = {rank: each for rank, _, each in found}
        ctx.call, ctx.shape = (context, case, saved), (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx, *grads):
        (dout,) = grads
        context, case, saved = ctx.call

        # What was saved remembers a mesh whose threads have ended; backward gets another.
        def body(mesh: Mesh):
            rank = mesh.rank("cp")
            own = replace(saved[rank], job=replace(saved[rank].job, mesh=mesh))
            return rank, backward_rank(dout[:, :, rows_of(case.q_rows[rank])], own)

        shapes = (ctx.shape[0], ctx.shape[1], ctx.shape[1])
        whole = tuple(torch.zeros(shape, dtype=dout.dtype) for shape in shapes)
        for rank, own in LocalWorld(context.sizes).run(body):
            sides = (case.q_rows, case.kv_rows, case.kv_rows)
            for target, rows, grad in zip(whole, sides, own, strict=True):
                target[:, :, rows_of(rows[rank])] = grad
        return *whole, None, None


def gradcheck(context: Context, call: Call) -> bool:
    """Whether backward equals the numerical gradient of forward, entry by entry, in float64."""
    known: Reference = reference(call)
    inputs = [x.clone().requires_grad_() for x in (known.q, known.k, known.v)]
    return torch.autograd.gradcheck(
        lambda q, k, v: _Whole.apply(q, k, v, context, call), inputs, raise_exception=False
    )


def gradcheck_rows(jobs: Sequence[Job]) -> list[dict]:
    """Rows that say whether numerical gradients agree."""
    torch.set_num_threads(1)
    rows = []
    for name, context, call in jobs:
        row = {"part": "gradcheck", "ranks": context.degree, "plan": name, "right": False}
        try:
            row["right"] = gradcheck(context, call)
        except (StrettoError, RuntimeError, AssertionError) as error:
            row["wrong"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows
