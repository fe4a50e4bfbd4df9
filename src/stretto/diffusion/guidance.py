"""The cfg axis: one guided prediction computed by several ranks, exactly.

Batched guidance is cut along dim 0 of the denoiser's arguments; pipelines that call the denoiser
once per branch give each rank whole calls. The same cut lets step ranks share an exact step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.diffusion.exchange import digest
from stretto.errors import SplitMismatch
from stretto.mesh.mesh import Mesh
from stretto.plan.options import Guidance

#: Arguments that hold no batch although their dim 0 may coincide with it.
NEVER_SPLIT = frozenset(
    {"image_rotary_emb", "img_ids", "txt_ids", "freqs_cis", "ids", "rotary_emb", "video_ids"}
)


@dataclass
class Denoise:
    """One call of a denoiser: which module, which call of it in this step, its arguments."""

    module: str
    forward: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    splits: bool = True
    never_split: frozenset[str] = NEVER_SPLIT
    index: int = 0

    @property
    def key(self) -> tuple:
        """Equal for calls whose outputs have equal form."""
        shapes = [(t.shape, t.dtype) for t in tensors_of((self.args, self.kwargs))]
        return (self.module, self.index, *shapes)

    @property
    def batch(self) -> int:
        """Dim 0 of the latent argument: the first tensor that is more than a table."""
        for tensor in tensors_of((self.args, self.kwargs)):
            if tensor.ndim >= 3:
                return tensor.shape[0]
        return 1

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def chunk(self, index: int, chunks: int) -> Denoise:
        """The same call on one of `chunks` equal contiguous parts of the batch."""
        batch = self.batch
        size = batch // chunks
        part = slice(index * size, (index + 1) * size)
        kwargs = {
            name: value if name in self.never_split else cut(value, batch, part)
            for name, value in self.kwargs.items()
        }
        args = tuple(cut(value, batch, part) for value in self.args)
        return Denoise(
            self.module, self.forward, args, kwargs, self.splits, self.never_split, self.index
        )


class Branches:
    """Evaluates denoiser calls over the cfg axis, and exact steps over the step axis too.

    `verified` holds modules whose batch was found independent; others are checked at their first
    cut, joint against split. `runs` counts forward passes made on this rank.
    """

    def __init__(self, option: Guidance, mesh: Mesh, verified: set[str]):
        self.option = option
        self.mesh = mesh
        self.runs = 0
        self._verified = verified
        self._independent: set[tuple[str, int]] = set()
        self._distributed = False
        self._calls = 0
        self._is_batched = False
        self._steps = 0

    def evaluate(self, call: Denoise, known: Any, *, share_step: bool) -> Any:
        """The call's true output; on cfg ranks > 0 of whole calls a remembered one may stand in.

        `known` is an earlier output of the same form, None on the first call of that form.
        """
        degree = self.mesh.size("cfg")
        share_step = share_step and known is not None and call.splits
        if degree == 1 or not call.splits:
            return self._verify(call, self._shared(call, known)) if share_step else self._run(call)
        self._calls = max(self._calls, call.index + 1)
        if self._takes_batch(call):
            self._is_batched = True
            return self._batch(call, known, share_step)
        if known is None:
            return self._run(call)
        return self._whole_call(call, known)

    @property
    def holds_whole_calls(self) -> bool:
        """Whether ranks > 0 of the group hold placeholders for some calls of this step."""
        return self.mesh.size("cfg") > 1 and self._calls > 0 and not self._is_batched

    def settle(self, guided: Tensor) -> Tensor:
        """The guided prediction of the group: that of its leader, where calls were distributed."""
        if not self._distributed:
            return guided
        self._distributed = False
        return self.led(guided)

    def led(self, guided: Tensor) -> Tensor:
        """The leader's tensor on all ranks of the group."""
        return self.mesh.broadcast(guided.contiguous().clone(), "cfg", 0, "guidance").wait()

    def next_step(self) -> None:
        """After a scheduler step. Raises SplitMismatch when the cfg axis has nothing to do."""
        degree = self.mesh.size("cfg")
        if self._steps == 0 and degree > 1 and not self._is_batched and self._calls < degree:
            raise SplitMismatch(
                f"cfg={degree}, but a step makes {self._calls} denoiser call(s) whose batch does "
                f"not divide by {degree}: turn guidance on, or use cfg={max(1, self._calls)} and "
                "give the ranks to step"
            )
        self._steps += 1

    def _run(self, call: Denoise) -> Any:
        self.runs += 1
        return call.run()

    def _verify(self, call: Denoise, split: Any) -> Any:
        """Hold the first cut of a module's batch against the whole. Raises SplitMismatch."""
        if call.module not in self._verified:
            check_split(call, split)
            self._verified.add(call.module)
        return split

    def _takes_batch(self, call: Denoise) -> bool:
        if self.option.split == "calls":
            return False
        divides = call.batch % self.mesh.size("cfg") == 0
        if self.option.split == "batch" and not divides:
            raise SplitMismatch(
                f"cfg={self.mesh.size('cfg')} does not divide the denoiser's batch {call.batch}; "
                'use split="calls" or a degree that divides it'
            )
        return divides

    def _batch(self, call: Denoise, known: Any, share_step: bool) -> Any:
        degree, own = self.mesh.size("cfg"), self.mesh.rank("cfg")
        part = call.chunk(own, degree)
        known_part = None if known is None else cut(known, call.batch, slice(0, part.batch))
        mine = self._shared(part, known_part) if share_step else self._run(part)
        whole = mapped(lambda t: self._gather(t, "cfg", "guidance"), mine)
        return self._verify(call, whole)

    def _gather(self, tensor: Tensor, axis: str, phase: str) -> Tensor:
        return torch.cat(self.mesh.all_gather(tensor.contiguous(), axis, phase).wait())

    def _whole_call(self, call: Denoise, known: Any) -> Any:
        """Call k belongs to cfg rank k mod degree; the leader needs every output."""
        owner, own = call.index % self.mesh.size("cfg"), self.mesh.rank("cfg")
        self._distributed = True
        self._check_independent(call)
        output = self._run(call) if own == owner else known
        if owner == 0 or own not in (0, owner):
            return output

        def move(tensor: Tensor) -> Tensor:
            moved = self.mesh.permute(tensor.contiguous(), "cfg", {owner: 0}, "guidance").wait()
            return tensor if moved is None else moved

        return mapped(move, output)

    def _check_independent(self, call: Denoise) -> None:
        """A call whose inputs come from an earlier call of its step cannot run beside it."""
        what = (call.module, call.index)
        if what in self._independent:
            return
        own = digest(*tensors_of((call.args, call.kwargs)))
        if len(set(self.mesh.gather_bytes(own, "cfg"))) > 1:
            raise SplitMismatch(
                f"{call.module}: call {call.index} of a step depends on the output of an earlier "
                f"one, so {self.mesh.size('cfg')} ranks cannot make them side by side; use cfg=1"
            )
        self._independent.add(what)

    def _shared(self, call: Denoise, known: Any) -> Any:
        """An exact step's batch over the step ranks: `chunks_of` of them work, all get all."""
        ranks, own = self.mesh.size("step"), self.mesh.rank("step")
        chunks = chunks_of(call.batch, ranks)
        if chunks == 1:
            return self._run(call)
        size = call.batch // chunks
        mine = self._run(call.chunk(own, chunks)) if own < chunks else None
        template = cut(known, call.batch, slice(0, size))
        if chunks == ranks:
            return mapped(lambda t: self._gather(t, "step", "exact"), mine)
        parts = []
        for owner in range(chunks):
            piece = mine if own == owner else template
            parts.append(mapped(lambda t, o=owner: self._spread(t, o), piece))
        return _join(parts)

    def _spread(self, tensor: Tensor, owner: int) -> Tensor:
        return self.mesh.broadcast(tensor.contiguous().clone(), "step", owner, "exact").wait()


def chunks_of(batch: int, ranks: int) -> int:
    """How many ranks share a batch in equal parts: its largest divisor within `ranks`."""
    return max(k for k in range(1, ranks + 1) if batch % k == 0)


def check_split(call: Denoise, split: Any) -> None:
    """Hold a cut evaluation against the whole one, once. Raises SplitMismatch."""
    whole = call.run()
    for a, b in zip(tensors_of(whole), tensors_of(split), strict=True):
        limit = torch.finfo(a.dtype).eps ** 0.5
        error = float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-30))
        if not error <= limit:
            raise SplitMismatch(
                f"{call.module}: cutting the batch of {call.batch} changes its output by "
                f"{error:.2g} (relative, limit {limit:.2g}), so its rows depend on one another; "
                "use cfg=1 and Steps(exact_split=False)"
            )


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_of(item)]
    return []


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        fields = {key: mapped(change, item) for key, item in value.items()}
        return type(value)(**fields) if type(value) is not dict else fields
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, item) for item in value)
    return value


def cut(value: Any, batch: int, part: slice) -> Any:
    """The rows `part` of everything whose dim 0 (or length, for plain lists) is the batch."""
    if isinstance(value, list) and len(value) == batch and not tensors_of(value):
        return value[part]
    return mapped(lambda t: t[part] if t.ndim and t.shape[0] == batch else t, value)


def _join(parts: list) -> Any:
    """Outputs of equal form, joined along dim 0 tensor by tensor."""
    leaves = [iter(tensors_of(part)) for part in parts[1:]]
    return mapped(lambda first: torch.cat([first, *(next(rest) for rest in leaves)]), parts[0])
