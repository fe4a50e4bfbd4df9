"""Attention over a sequence that is split over ranks: the public operator, with gradients.

B batch   H query heads   G key/value heads   L, S rows of q and of k, v here   D head dim
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stretto.errors import ConfigError, PlanMismatch, RanksDisagree, ShapeError, UnsupportedModel
from stretto.mesh.count import CountingMesh
from stretto.mesh.local import LocalMesh
from stretto.mesh.mesh import Mesh
from stretto.ops.attention import backends
from stretto.ops.attention.rank import backward_rank, forward_rank
from stretto.ops.attention.sinks import check as check_sinks
from stretto.ops.attention.sinks import gradient as gradient_of_sinks
from stretto.ops.attention.sinks import joined
from stretto.plan.checks import is_whole
from stretto.plan.context import AttentionCase, Context, Tile, of_sequence
from stretto.plan.ranges import Mask, packed

__all__ = ["attention", "backward_rank", "forward_rank"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh | None = None,
    plan: Context | None = None,
    causal: bool = False,
    window: int | None = None,
    documents: Sequence[int] | None = None,
    q_offset: int | None = None,
    tokens: int | tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
) -> Any:
    """Exact softmax attention over a sequence split along mesh["cp"], differentiable.

    q is (B, H, L, D), k and v are (B, G, S, D), H a multiple of G: this rank's rows in the plan's
    layout, in ascending order of position (`layout.shard` cuts them). One dtype: float64 or
    float32, on CUDA also bfloat16, float16. Returns out like q; with `return_lse` also the natural
    log-sum-exp (B, H, L), float32 (float64 for float64), not differentiable. A query that sees no
    key has out 0, lse -inf and gradient 0.

    `plan`: a Context (or a Plan, whose `cp` is taken); None takes the tile that the mesh's sizes
    describe. `mesh` None is one rank. `causal`: query i sees keys up to i + q_offset; `window`:
    only the last `window` of those (both sides without causal); `documents`: lengths that sum to
    the keys of the whole sequence, attention stays within each. `tokens`: lengths of the whole
    sequence, of queries and keys if they differ; None asks the other ranks, one small message per
    call, unless `documents` tell. `scale` is D**-0.5. `sinks` (H,): a logit per query head that
    joins every softmax and has no value; differentiable, gradients are this rank's share.

    Sends plan.wire(case) bytes per rank, nothing on one. Results do not depend on timing. The
    first call of a kind compares plan and case among the ranks, and who wants lse and gradients.
    Raises ShapeError; PlanMismatch when degrees do not fit heads or mesh; UnsupportedModel for
    dropout and dense masks; ConfigError; RanksDisagree; MeshTimeout, RankLost.
    Source: StarTrail, NeurIPS 2025, section 3; Ring Attention; DeepSpeed-Ulysses.
    """
    _refuse(attn_mask, dropout_p, scale)
    _check_tensors(q, k, v)
    if sinks is not None:
        check_sinks(sinks, q)
    context = _context(mesh, plan)
    if not isinstance(causal, bool):
        raise ConfigError(f"causal={causal!r}: expected True or False")
    mask = Mask(causal=causal, window=window, q_offset=q_offset, documents=packed(documents))
    shapes = (q.shape[0], q.shape[1], k.shape[1], q.shape[3])
    context.check_heads(q.shape[1], k.shape[1])
    backends.choose(q.device, q.dtype, q.shape[3], backend)
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    mesh = mesh if context.degree > 1 else None
    if gradients:
        _check_threads(mesh, q)
    kind = (shapes, scale, str(q.dtype), backend, return_lse, sinks is not None, gradients)
    lengths, held = _lengths(mesh, context, mask, _known(tokens), (q, k), kind)
    rank = mesh.rank("cp") if mesh is not None else 0
    with_lse = return_lse or sinks is not None
    case = _case(context, *lengths, shapes, q.element_size(), mask, rank, with_lse)
    with contextlib.nullcontext() if held else _ending_peers(mesh, "attention"):
        _check_rows(case, context, held or {rank: (q.shape[2], k.shape[2])})
    settings = (mesh, context, case, scale, backend)
    if gradients:
        out, lse = _Attention.apply(q, k, v, sinks, settings)
    else:
        out, lse, _ = _forward(q, k, v, sinks, settings)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """Saves q, k, v after the exchange of heads, the output, lse, and what the plan keeps.

    Received keys and values are fetched again in backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, settings):
        out, lse, saved = _forward(q, k, v, sinks, settings)
        tensors, ctx.together = saved.apart()
        ctx.settings = settings
        of_sinks = (None, None, None) if sinks is None else (sinks, out, lse)
        ctx.save_for_backward(*of_sinks, *tensors)
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyrefly: ignore[bad-override]
        sinks, out, home_lse, *tensors = ctx.saved_tensors
        dout, _ = grad_outputs  # lse is not differentiable
        with _ending_peers(ctx.settings[0], "attention backward"):
            grads = backward_rank(dout, ctx.together(tensors))
        dsinks = None if sinks is None else gradient_of_sinks(dout, out, home_lse, sinks)
        return *grads, dsinks, None


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, settings: tuple) -> tuple:
    mesh, context, case, scale, backend = settings
    with _ending_peers(mesh, "attention forward"):
        out, lse, saved = forward_rank(
            q, k, v, mesh=mesh, context=context, case=case, scale=scale, backend=backend
        )
    if sinks is None:
        return out, lse, saved
    assert lse is not None, "sinks ask for the log-sum-exp"
    with torch.no_grad():
        return joined(out, lse, saved, sinks)


def _ending_peers(mesh: Mesh | None, what: str):
    return contextlib.nullcontext() if mesh is None else mesh.ending_peers(what)


# ---- what is asked -----------------------------------------------------------------------------


def _refuse(attn_mask: Tensor | None, dropout_p: float, scale: object) -> None:
    if attn_mask is not None:
        shape = tuple(getattr(attn_mask, "shape", ())) or type(attn_mask).__name__
        raise UnsupportedModel(
            f"attn_mask of shape {shape}: a dense mask cannot be split exactly "
            "without sending it around\n"
            "  to fix: causal=True, window=..., and documents=(lengths) for padding and packing"
        )
    if dropout_p:
        raise UnsupportedModel(
            f"dropout_p={dropout_p}: dropout masks of sequence-parallel attention would depend "
            "on the plan\n  to fix: attention dropout 0, and dropout after the output projection"
        )
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and abs(scale) <= sys.float_info.max):
        raise ConfigError(f"scale={scale!r}: expected a finite number, or None for D**-0.5")


def _known(tokens: Any) -> tuple[int, int] | None:
    """Lengths of the whole sequence, of queries and of keys, as the caller tells them."""
    if tokens is None:
        return None
    pair = (tokens, tokens) if is_whole(tokens) else tokens
    if isinstance(pair, Sequence) and len(pair) == 2 and all(is_whole(n) and n >= 0 for n in pair):
        return pair[0], pair[1]
    raise ShapeError(f"tokens={tokens!r}: expected a length, or (queries, keys), of all ranks")


def _check_threads(mesh: Mesh | None, q: Tensor) -> None:
    """Autograd has one thread per device: a rank's backward would wait in it for another's."""
    while isinstance(mesh, CountingMesh):
        mesh = mesh.mesh
    if isinstance(mesh, LocalMesh) and q.is_cuda:
        raise ConfigError(
            f"gradients of {mesh.size('cp')} virtual ranks on {q.device} through autograd\n"
            "  why: its one thread per device cannot serve ranks that wait for one another\n"
            "  to fix: forward_rank and backward_rank, torch.no_grad(), or a process per rank"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"{name} is a {type(x).__name__}, no tensor\n"
                "  to fix: tensors of (batch, heads, rows, head dim); torch.as_tensor makes them"
            )
    if any(x.layout != torch.strided or x.is_nested for x in (q, k, v)):
        kinds = ", ".join("nested" if x.is_nested else str(x.layout) for x in (q, k, v))
        raise ShapeError(
            f"layouts of q, k, v: {kinds}; kernels read torch.strided\n"
            "  to fix: to_dense(), and documents=(lengths) for sequences of several lengths"
        )
    if not q.ndim == k.ndim == v.ndim == 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k, v have shapes {shapes}; expected (batch, heads, rows, head dim)")
    if k.shape != v.shape:
        raise ShapeError(f"k is {tuple(k.shape)} and v is {tuple(v.shape)}; they must be alike")
    if not q.shape[3]:
        raise ShapeError(f"q is {tuple(q.shape)}: a head dim of 0 has no scores")
    facts = {
        "dtype": (q.dtype, k.dtype, v.dtype),
        "device": (q.device, k.device, v.device),
        "batch": (q.shape[0], k.shape[0], v.shape[0]),
        "head dim": (q.shape[3], k.shape[3], v.shape[3]),
    }
    for what, values in facts.items():
        if len(set(values)) > 1:
            raise ShapeError(f"{what} of q, k, v: {', '.join(map(str, values))}; they must be one")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key/value heads"
        )


#: One rank's plan.
_ALONE = Context()


def _context(mesh: Mesh | None, plan: Context | None) -> Context:
    """The plan asked for, or the one that the mesh describes; they must agree."""
    context = None if plan is None else of_sequence(plan)
    if mesh is None:
        ranks = getattr(plan, "world_size", 1 if context is None else context.degree)
        if context is not None and ranks > 1:
            words = context.short() if plan is context else plan
            raise PlanMismatch(
                f"the plan {words} needs {ranks} ranks, and no mesh is given; "
                "pass mesh=init_mesh(plan), or no plan for one rank"
            )
        return context or _ALONE
    if not isinstance(mesh, Mesh):
        raise ConfigError(
            f"mesh={mesh!r} is a {type(mesh).__name__}, no Mesh\n"
            "  to fix: mesh=stretto.init_mesh(plan), or None for one rank"
        )
    sizes = {axis: mesh.size(axis) for axis in _ALONE.sizes}
    if context is None:
        return _described(sizes)
    wanted = context.sizes
    if not context.two_level:
        sizes = {axis: mesh.size(axis) for axis in ("ring", "team", "ulysses")}
        wanted = {axis: getattr(context, axis) for axis in sizes}
    if sizes != wanted:
        raise PlanMismatch(
            f"the plan {context.short()} needs axes {_axes(wanted)}, the mesh has {_axes(sizes)}"
        )
    return context


def _described(sizes: dict[str, int]) -> Context:
    """The tile on a mesh's axes, of two levels where an axis has both."""
    out, inner = (
        {axis: sizes[f"{axis}_{level}"] for axis in ("ring", "team")} for level in ("out", "in")
    )
    both = any(out[axis] > 1 and inner[axis] > 1 for axis in out)
    tile = Tile(team_inner=inner["team"], ring_inner=inner["ring"]) if both else Tile()
    return Context(
        ulysses=sizes["ulysses"],
        team=out["team"] * inner["team"],
        ring=out["ring"] * inner["ring"],
        schedule=tile,
    )


def _axes(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


@lru_cache(maxsize=256)
def _case(
    context: Context,
    q_tokens: int,
    kv_tokens: int,
    shapes: tuple[int, int, int, int],
    item_bytes: int,
    mask: Mask,
    rank: int,
    return_lse: bool,
) -> AttentionCase:
    batch, heads_q, heads_kv, head_dim = shapes
    return AttentionCase.of(
        context,
        tokens=q_tokens,
        kv_tokens=kv_tokens,
        heads=(heads_q, heads_kv),
        head_dim=head_dim,
        batch=batch,
        item_bytes=item_bytes,
        mask=mask,
        rank=rank,
        return_lse=return_lse,
    )


def _check_rows(case: AttentionCase, context: Context, held: Mapping[int, tuple[int, int]]) -> None:
    """The rows of q and k that ranks hold must be those of the layout."""
    for rank, given in held.items():
        for name, rows, count in zip("qk", (case.q_rows, case.kv_rows), given, strict=True):
            if count != rows[rank].rows:
                raise ShapeError(
                    f"{name} has {count} rows on cp rank {rank}; layout {context.layout!r} of "
                    f"{sum(part.rows for part in rows)} rows over {context.degree} ranks gives it "
                    f"{rows[rank].rows}; cut tensors with stretto.ops.attention.layout.shard"
                )


# ---- agreement ---------------------------------------------------------------------------------


def _lengths(
    mesh: Mesh | None,
    context: Context,
    mask: Mask,
    known: tuple[int, int] | None,
    local: tuple[Tensor, Tensor],
    what: tuple,
) -> tuple[tuple[int, int], dict[int, tuple[int, int]] | None]:
    """Rows of the whole sequence, of queries and keys, and of every rank if ranks were asked.

    Makes sure that all ranks mean the same call, once where nobody need be asked for lengths.
    """
    here = (local[0].shape[2], local[1].shape[2])
    if mesh is None:
        return known or here, None
    if known is None and mask.documents is not None and mask.q_offset is None:
        known = (sum(mask.documents),) * 2
    key = (context, mask, known, *what)
    if known is not None and key in mesh.agreed:
        return known, None
    text = "\n".join(f"{name}: {value}" for name, value in zip(_COMPARED, key, strict=True))
    held = _agreed(mesh, text, here)
    mesh.agreed.add(key)
    totals = (sum(q for q, _ in held.values()), sum(k for _, k in held.values()))
    return known or totals, held


#: What ranks compare, in the order of the key. A rank without gradients would not answer those
#: that wait for it in backward.
_COMPARED = (
    "plan",
    "mask",
    "tokens",
    "batch, heads, head dim",
    "scale",
    "dtype",
    "backend",
    "return_lse",
    "sinks",
    "gradients",
)


def _agreed(mesh: Mesh, text: str, here: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Compare what every rank is about to do; the rows of q and k that each holds."""
    digest = hashlib.sha256(text.encode()).digest()[:8]
    mine = torch.tensor([*here, int.from_bytes(digest, "little", signed=True)])
    every = [other.tolist() for other in mesh.all_gather(mine, "cp", "control").wait()]
    if any(other[2] != every[0][2] for other in every):
        texts = [data.decode() for data in mesh.gather_bytes(text.encode(), "cp")]
        raise RanksDisagree(_difference(texts))
    return {rank: (q, k) for rank, (q, k, _) in enumerate(every)}


def _difference(texts: list[str]) -> str:
    """Which field differs, and what it is where."""
    for lines in zip(*(text.split("\n") for text in texts), strict=False):
        if len(set(lines)) > 1:
            values = {line: [r for r, other in enumerate(lines) if other == line] for line in lines}
            sides = "; ".join(f"cp ranks {ranks}: {line}" for line, ranks in values.items())
            return f"ranks are about to run different attention calls: {sides}"
    return "ranks are about to run different attention calls"
