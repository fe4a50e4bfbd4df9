"""Attention calls drawn at random, plan and tensors, carried out by `stretto.attention` on ranks.

What a call must give is written out here once more, from the words of its docstring, and shares no
code with masks, layouts or kernels of the product.
"""

import random
from dataclasses import dataclass, field

import torch

import stretto
from stretto import axes
from stretto.mesh.local import LocalWorld
from stretto.ops.attention.layout import row_positions
from stretto.plan.circulation import KEEPS
from stretto.plan.context import (
    Context,
    DoubleRing,
    Gather,
    Ring,
    StarTrail,
    Tile,
    legal_ulysses,
    named_points,
)
from stretto.plan.ranges import Mask, shard
from stretto.testing.close import allowance, distance

DTYPES = (*(torch.float64,) * 5, torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("plain", "rows first", "every second", "shifted", "one row", "one head")
RESULTS = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Drawn:
    """One call; `differentiated`: which of q, k, v, sinks, by rank modulo its length.

    `times`: how often it is made on one mesh; the last results count. `sizes`: of the mesh, axes
    in any order and several groups of ranks that each make the call; empty for the plan's.
    """

    context: Context
    tokens: int
    kv_tokens: int
    heads: tuple[int, int]
    head_dim: int
    batch: int
    dtype: torch.dtype
    options: dict = field(default_factory=dict)
    sinks: bool = False
    described: bool = False
    told: bool = False
    differentiated: tuple[str, ...] = ("qkv",)
    strides: tuple[str, str, str, str] = ("plain",) * 4
    times: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    @property
    def mask(self):
        names = ("causal", "window", "q_offset", "documents")
        return Mask(**{name: self.options[name] for name in names if name in self.options})

    def whole(self):
        """q, k, v, dout (B, heads, rows, D) and sinks (H,), in the dtype of the call."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = (self.tokens, self.kv_tokens, self.kv_tokens, self.tokens)
        heads = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        shapes = [(self.batch, h, n, self.head_dim) for h, n in zip(heads, rows, strict=True)]
        draw = {"generator": generator, "dtype": torch.float64}
        found = [torch.randn(shape, **draw) for shape in [*shapes, (self.heads[0],)]]
        for at, stride in enumerate(self.strides):
            if stride == "one row":
                found[at] = found[at][:, :, :1].expand_as(found[at])
            if stride == "one head":
                found[at] = found[at][:, :1].expand_as(found[at])
        return [x.to(self.dtype) for x in found]

    def visible(self):
        """(queries, keys), True where a query sees a key."""
        here = torch.arange(self.tokens)[:, None] + (self.options.get("q_offset") or 0)
        key = torch.arange(self.kv_tokens)[None]
        seen = torch.ones(self.tokens, self.kv_tokens, dtype=torch.bool)
        window, lengths = self.options.get("window"), self.options.get("documents")
        if self.options.get("causal"):
            seen &= key <= here
        if window is not None:
            seen &= (here - key).abs() < window
        if lengths is not None:
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            seen &= number[here] == number[key]
        return seen

    def expected(self, dtype):
        """out, lse, dq, dk, dv, dsinks of one device, by autograd through a softmax."""
        *tensors, sinks = (x.to(dtype) for x in self.whole())
        q, k, v, dout = tensors
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        group = self.heads[0] // self.heads[1]
        k_all, v_all = (x.to(wide).repeat_interleave(group, 1) for x in leaves[1:3])
        scale = self.options.get("scale")
        scores = leaves[0].to(wide) @ k_all.mT * (self.head_dim**-0.5 if scale is None else scale)
        scores = scores.masked_fill(~self.visible(), float("-inf"))
        column = leaves[3].to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        joined = torch.cat([scores, column], -1) if self.sinks else scores
        lse = joined.logsumexp(-1)
        safe = lse.detach().masked_fill(lse.isneginf(), 0.0)[..., None]
        powers = (joined - safe).exp()
        total = powers.sum(-1, keepdim=True)
        weights = (powers / torch.where(total == 0, 1.0, total))[..., : self.kv_tokens]
        out = (weights.to(dtype).to(wide) @ v_all).to(dtype)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        pairs = zip(leaves, grads, strict=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in pairs]
        return (out.detach(), lse.detach(), *grads)


def strided(x, stride):
    """The same numbers, otherwise in memory."""
    if stride == "rows first":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if stride == "every second":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
    if stride == "shifted":
        flat = torch.cat([x.new_full((1,), float("nan")), x.flatten()])
        return flat[1:].view(x.shape)
    if stride == "one row" and x.shape[2]:
        return x[:, :, :1].expand_as(x)
    if stride == "one head":
        return x[:, :1].expand_as(x)
    return x


def run(call):
    """out, lse, dq, dk, dv, dsinks of a call, put together; None for what nobody asked for."""
    layout, degree = call.context.layout, call.context.degree
    q_rows = [row_positions(r) for r in shard(layout, call.tokens, degree, call.mask)]
    k_rows = [row_positions(r) for r in shard(layout, call.kv_tokens, degree, call.mask)]
    parts = LocalWorld(call.sizes or call.context.sizes, timeout_s=30).run(
        lambda mesh: [
            on_rank(call, mesh, q_rows[mesh.rank("cp")], k_rows[mesh.rank("cp")])
            for _ in range(call.times)
        ][-1]
    )
    whole = [torch.full_like(x, float("nan")) for x in call.expected(call.dtype)]
    whole[5].zero_()
    groups = len(parts) // degree
    checked = [torch.zeros(x.shape[2] if x.ndim > 2 else 1, dtype=torch.bool) for x in whole]
    for rank, found in parts:
        sides = (q_rows, q_rows, q_rows, k_rows, k_rows)
        for at, own in enumerate(found):
            if own is None:
                continue
            if at == 5:
                whole[5] += own / groups
                checked[5][:] = True
            else:
                whole[at][:, :, sides[at][rank]] = own
                checked[at][sides[at][rank]] = True
    return whole, checked


def on_rank(call, mesh, q_at, k_at):
    """The rank's logical index, and its rows of every result."""
    q, k, v, dout, sinks = call.whole()
    cut = [x[:, :, at] for x, at in ((q, q_at), (k, k_at), (v, k_at), (dout, q_at))]
    *cut, dout = (strided(x, s) for x, s in zip(cut, call.strides, strict=True))
    leaves = dict(zip("qkvs", [x.detach() for x in (*cut, sinks)], strict=True))
    rank = mesh.rank("cp")
    for name in call.differentiated[rank % len(call.differentiated)]:
        leaves[name].requires_grad_()
    options = dict(call.options)
    if call.sinks:
        options["sinks"] = leaves["s"]
    if call.told:
        options["tokens"] = (call.tokens, call.kv_tokens)
    result = stretto.attention(
        leaves["q"], leaves["k"], leaves["v"],
        mesh=None if call.context.degree == 1 and call.told else mesh,
        plan=None if call.described else call.context,
        **options,
    )  # fmt: skip
    out, lse = result if options.get("return_lse") else (result, None)
    if out.requires_grad:
        out.backward(dout)
    assert out.dtype == call.dtype
    assert out.shape == q[:, :, q_at].shape
    return rank, (out.detach(), lse, *(leaves[name].grad for name in "qkvs"))


def check(call):
    """As near to the truth as one device is, eight times that at most; float64: 1e-12.

    Eight, because many calls are drawn and small ones come out right on one device by luck.
    """
    found, checked = run(call)
    bases, refs = call.expected(call.dtype), call.expected(torch.float64)
    floors = rounding(call, refs)
    for name, x, rows, base, ref in zip(RESULTS, found, checked, bases, refs, strict=True):
        if name == "dsinks":
            x, base, ref = (y[None, None] for y in (x, base, ref))
            rows = rows.expand(ref.shape[2])
        x, base, ref = (y[:, :, rows] for y in (x, base, ref))
        limit = max(allowance(call.dtype, base, ref, 8.0), floors.get(name, 0.0))
        error = distance(x, ref)
        assert error <= limit, f"{name} is off by {error:.3g}, allowed is {limit:.3g}"


def rounding(call, refs):
    """What the dtype costs where score gradients cancel, which one device may miss by luck.

    Kernels find them as dout . v - delta, both as large as delta, and delta through a rounded
    output. The log-sum-exp of half precision comes from exponentials of 16 bits.
    """
    q, k, _, dout, _ = (x.double() for x in call.whole())
    scale = call.options.get("scale")
    scale = call.head_dim**-0.5 if scale is None else abs(scale)
    delta = peak((dout * refs[0]).sum(-1))
    eps = torch.finfo(call.dtype).eps
    unit = 4 * eps * delta * scale
    # Rows that are all alike, drawn in float64 only, err the same way.
    power = 1.0 if call.dtype == torch.float64 else 0.5
    readers = (call.tokens * call.heads[0] / call.heads[1]) ** power
    keys = call.kv_tokens**0.5
    return {
        "dq": unit * peak(k) * keys,
        "dk": unit * peak(q) * readers,
        "dv": 4 * eps * peak(dout) * readers,
        "lse": eps * peak(refs[1][refs[1].isfinite()]),
        "dsinks": unit / scale * (call.tokens * call.batch) ** 0.5 if scale else 0.0,
    }


def peak(x):
    return x.abs().max().item() if x.numel() else 0.0


# ---- what is drawn -------------------------------------------------------------------------------


def draw(seed, most_ranks=16):
    """The call of a seed."""
    rng = random.Random(seed)
    ranks = rng.choice([n for n in (1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 12, 16) if n <= most_ranks])
    groups = rng.choice((1, 1, 2, 3, 4))
    heads = (groups * rng.choice((1, 2, 4)), groups)
    if rng.random() < 0.3:
        heads = (ranks, ranks)
    context, described = draw_context(rng, ranks, heads)
    tokens, kv_tokens, options = draw_mask(rng, ranks)
    context = with_layout(rng, context, tokens, kv_tokens)
    sizes = draw_sizes(rng, context) if rng.random() < 0.3 else {}
    options["return_lse"] = rng.random() < 0.5
    options["backend"] = rng.choice(("auto",) * 5 + ("naive",))
    if rng.random() < 0.25:
        options["scale"] = rng.choice((0.3, 1.0, 0.0, -0.5, 2))
    names = "qkvs"
    some = lambda: "".join(n for n in names if rng.random() < 0.6) or "k"  # noqa: E731
    differentiated = rng.choice((("qkv",), ("qkvs",), (some(),), (some(), some()), ("",)))
    sinks = rng.random() < 0.25
    if not sinks or len({"s" in d for d in differentiated}) > 1:
        # Gradients of sinks are shares: all ranks want theirs, or none does.
        differentiated = tuple(d.replace("s", "") or "v" if d else d for d in differentiated)
    dtype = rng.choice(DTYPES)
    # Rows that are all alike cancel in gradients, and rounding alone is left.
    strides = STRIDES if dtype == torch.float64 else STRIDES[:4]
    return Drawn(
        context, tokens, kv_tokens, heads,
        head_dim=rng.choice((1, 2, 4, 5, 8, 8, 8, 16, 40, 64, 128, 256)),
        batch=rng.choice((1, 1, 1, 2, 3)),
        dtype=dtype,
        options=options,
        sinks=sinks,
        described=described and context.layout == "auto",
        told=rng.random() < 0.4,
        differentiated=differentiated,
        strides=tuple(rng.choice(("plain", "plain", *strides)) for _ in range(4)),
        times=rng.choice((1, 1, 1, 2)),
        sizes=sizes,
        seed=seed,
    )  # fmt: skip


def draw_mask(rng, ranks):
    """Lengths of queries and keys, and the options that say who sees what."""
    tokens = rng.choice((rng.randint(0, ranks), rng.randint(1, 40), rng.randint(20, 90)))
    options = {"causal": rng.random() < 0.6}
    if rng.random() < 0.4:
        options["window"] = rng.choice((1, 2, 3, rng.randint(1, 12), rng.randint(1, 100)))
    kv_tokens = tokens
    if rng.random() < 0.5:
        kv_tokens = rng.choice((rng.randint(0, 12), rng.randint(1, 60), rng.randint(20, 90)))
        options["q_offset"] = rng.choice(
            (0, kv_tokens - tokens, rng.randint(-20, 20), rng.randint(0, 90))
        )
    elif rng.random() < 0.15:
        options["q_offset"] = rng.randint(-8, 8)
    if rng.random() < 0.4:
        kv_tokens = max(kv_tokens, tokens)
        if kv_tokens != tokens or "q_offset" in options:
            options["q_offset"] = rng.randint(0, kv_tokens - tokens)
        options["documents"] = draw_lengths(rng, kv_tokens)
    return tokens, kv_tokens, options


def draw_lengths(rng, total):
    cuts = sorted(rng.randint(0, total) for _ in range(rng.choice((0, 1, 3, 6, total // 2))))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def draw_context(rng, ranks, heads):
    """A plan of these ranks, and whether the mesh alone says as much."""
    if rng.random() < 0.35:
        return rng.choice(list(named_points(ranks, *heads).values())), False
    ulysses = rng.choice(legal_ulysses(*heads, ranks))
    rest = ranks // ulysses
    team = rng.choice([d for d in range(1, rest + 1) if rest % d == 0])
    ring = rest // team
    schedules = [draw_tile(rng, team, ring)] * 3 + [Gather(keep=rng.choice(("none", "all")))]
    wire, prune, keep = rng.choice(("input", "float32")), rng.random() < 0.7, rng.choice(KEEPS)
    if ring % team == 0:
        star = StarTrail(circulate=rng.choice(("q", "kv")), keep=keep)
        schedules += [star] * 3
    if team == 1:
        inner = rng.choice([d for d in range(1, ring + 1) if ring % d == 0])
        schedules += [
            DoubleRing(inner=inner, prune=prune, keep=keep, grad_wire=wire),
            Ring(
                circulate=rng.choice(("q", "kv")),
                gradients=rng.choice(("owner", "ride")),
                prune=prune,
                keep=keep,
                grad_wire=wire,
            ),
        ]
    chosen = rng.choice(schedules)
    context = Context(ulysses=ulysses, team=team, ring=ring, schedule=chosen)
    return context, chosen == Tile()


def draw_sizes(rng, context):
    """A mesh with the plan's axes anywhere in it, and perhaps two groups of ranks."""
    groups = rng.choice(({}, {"step": 2}, {"cfg": 2}, {"fsdp": 2})) if context.degree <= 6 else {}
    sizes = dict.fromkeys(axes.ORDER, 1) | context.sizes | groups
    return {axis: sizes[axis] for axis in rng.sample(axes.ORDER, len(axes.ORDER))}


def draw_tile(rng, team, ring):
    if rng.random() < 0.3:
        return Tile()
    inner = [rng.choice([d for d in range(1, n + 1) if n % d == 0]) for n in (team, ring)]
    return Tile(
        team_inner=inner[0],
        ring_inner=inner[1],
        prune=rng.random() < 0.7,
        keep=rng.choice(KEEPS),
        grad_wire=rng.choice(("input", "float32")),
    )


def with_layout(rng, context, tokens, kv_tokens):
    """The plan with a layout by name, or with ranges written out where both sides are alike."""
    kinds = ["auto", "auto", "zigzag", "contiguous", "documents"]
    kinds += ["ranges"] * 2 if tokens == kv_tokens else []
    layout = rng.choice(kinds)
    if layout == "ranges":
        owned = [[] for _ in range(context.degree)]
        lengths = draw_lengths(rng, tokens)
        start = 0
        for length in lengths:
            rng.choice(owned).append((start, start + length))
            start += length
        layout = tuple(tuple(spans) for spans in owned)
    options = {name: getattr(context, name) for name in ("ulysses", "team", "ring", "schedule")}
    return Context(**options, layout=layout)
