"""One family of language models on ranks against one rank: loss, logits and gradients.

The reference is the model as the library runs it, whole, with the attention it chooses itself.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from stretto.errors import StrettoError
from stretto.parallel.api import parallelize
from stretto.parallel.batch import IGNORED, shard
from stretto.plan.context import Context
from stretto.testing import families

if TYPE_CHECKING:
    from stretto.mesh.mesh import Mesh

#: Not divisible by the chunks of two or four ranks, and several windows long.
BATCH, TOKENS = 2, 22
#: Largest relative difference that counts as equal. Models are float64; routers, rotations and
#: norms of many families compute in float32 all the same, and round otherwise on fewer rows.
EQUAL = 2e-5
#: Gradients this far below the model's largest are compared at that scale: a key's bias has the
#: gradient zero, and what is found of it is rounding.
ZERO = 1e-6
#: The library's own loss is float32.
EQUAL_LOSS = 1e-5
LIMIT_S = 120


@dataclass(kw_only=True)
class Verdict:
    """What was found of one family.

    `verdict`: equal, refused, wrong, not built (the library cannot make this model here) or
    failed. Errors are relative to the largest value; `loss` says whose loss was compared.
    """

    family: str
    verdict: str
    reason: str = ""
    loss: str = ""
    loss_error: float | None = None
    logits_error: float | None = None
    gradient_error: float | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    family: str, mesh: Mesh, plan: Context, *, check: bool = True, tokens: int = TOKENS
) -> Verdict:
    """Compare a tiny random model of the family on `mesh` with itself on one rank.

    Every rank calls this and gets the same verdict. `check` False skips the examination of the
    model before it is bound, which shows that this comparison would find what that one refuses.
    """
    started = time.monotonic()
    verdict = _judge(family, mesh, plan, check, tokens)
    verdict.seconds = time.monotonic() - started
    return verdict


def _judge(family: str, mesh: Mesh, plan: Context, check: bool, tokens: int) -> Verdict:
    try:
        model = families.tiny_model(family)
    except Exception as error:  # noqa: BLE001 - whatever the library raises is its answer
        reason = " ".join(str(error).split())[:300]
        return Verdict(family=family, verdict="not built", reason=reason)
    batch = _batch(tokens)
    try:
        with parallelize(model, plan, mesh=mesh, check=check):
            found = _on_shard(model, batch, mesh, plan)
    except StrettoError as error:
        return Verdict(family=family, verdict="refused", reason=_first_line(error))
    return _compared(family, mesh, plan, found, _alone(model, batch))


def _batch(tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 100, (BATCH, tokens), generator=generator)
    labels = ids.clone()
    labels[:, 3:5] = IGNORED
    return {"input_ids": ids, "labels": labels}


@dataclass
class _Outcome:
    loss: float | None
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    total: float


def _on_shard(model, batch, mesh: Mesh, plan: Context) -> _Outcome:
    """This rank's part; gradients are not yet summed."""
    own = shard(batch, mesh, plan)
    targets, count = own["shift_labels"], own["num_items_in_batch"]
    try:
        return _step(model, own, targets, count)
    except StrettoError as error:
        if "loss ignores" not in str(error):
            raise
    kept = {"input_ids": own["input_ids"], "position_ids": own["position_ids"]}
    return _step(model, kept, targets, count)


def _alone(model, batch) -> _Outcome:
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return _step(model, {**batch, "use_cache": False}, targets, (targets != IGNORED).sum())


def _step(model, inputs: dict, targets: torch.Tensor, count: torch.Tensor) -> _Outcome:
    """Forward and backward of the summed cross entropy of the logits over `count`."""
    model.zero_grad()
    out = model(**inputs)
    total = (
        functional.cross_entropy(
            out.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        / count
    )
    total.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    loss = getattr(out, "loss", None)
    own = None if loss is None else float(loss.detach())
    return _Outcome(own, out.logits.detach(), gradients, float(total.detach()))


def _compared(family: str, mesh: Mesh, plan: Context, found: _Outcome, right: _Outcome) -> Verdict:
    names = sorted(right.gradients)
    missing = [name for name in names if name not in found.gradients]
    zero = {name: torch.zeros_like(right.gradients[name]) for name in missing}
    here = found.gradients | zero
    flat = torch.cat([here[name].double().flatten() for name in names])
    losses = torch.tensor([found.loss or 0.0, found.total], dtype=torch.float64)
    sums = mesh.all_reduce(torch.cat([flat, losses]), "cp", "control").wait()
    rows = shard(right.logits, mesh, plan)
    worst = torch.tensor([_relative(found.logits, rows)], dtype=torch.float64)
    logits = max(float(x) for x in mesh.all_gather(worst, "cp", "control").wait())
    sizes = [right.gradients[name].numel() for name in names]
    floor = ZERO * max(right.gradients[name].abs().max().item() for name in names)
    pairs = zip(sums[:-2].split(sizes), names, strict=True)
    gradient = max(_relative(part, right.gradients[name].flatten(), floor) for part, name in pairs)
    own = found.loss is not None and right.loss is not None
    told, wanted = (sums[-2], right.loss) if own else (sums[-1], right.total)
    loss = abs(float(told) - (wanted or 0.0)) / abs(right.total)
    equal = max(logits, gradient) <= EQUAL and loss <= EQUAL_LOSS
    return Verdict(
        family=family,
        verdict="equal" if equal else "wrong",
        loss="the model's" if own else "of the logits",
        loss_error=loss,
        logits_error=logits,
        gradient_error=gradient,
    )


def _relative(found: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest right value, or over `floor` where that is larger."""
    if not right.numel():
        return 0.0
    scale = max(right.abs().max().item(), floor)
    return (found - right).abs().max().item() / (scale or 1.0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def on_ranks(mesh: Mesh, names: Sequence[str], plan: Context, report: str) -> None:
    """Body of a rank: examine families one after another, rank 0 writes a line for each.

    A family that fails in an unforeseen way ends the ranks, for they may no longer be in step; the
    caller finds it at the end of the report and starts again behind it.
    """
    import json
    import warnings

    # Loading the library is nobody's time: on a busy machine it takes longer than a family.
    import transformers.models.auto.modeling_auto  # noqa: F401

    warnings.simplefilter("ignore")
    for name in names:
        with _limited(LIMIT_S), open(report, "a") as file:
            if mesh.world_rank == 0:
                file.write(json.dumps({"family": name, "verdict": "started"}) + "\n")
                file.flush()
            verdict = examine(name, mesh, plan)
            if mesh.world_rank == 0:
                file.write(json.dumps(verdict.as_dict()) + "\n")


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in this process's main thread after so many seconds."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
