"""The cfg axis: one guided prediction computed by several ranks, exactly.

Batched guidance is cut along dim 0 of the denoiser's arguments; pipelines that call the denoiser
once per branch give each rank whole calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stretto.diffusion import exact
from stretto.diffusion.denoise import Denoise, Passes, cut, mapped, tensors_of
from stretto.diffusion.exchange import digest
from stretto.errors import SplitMismatch
from stretto.mesh.mesh import Mesh
from stretto.plan.checks import divisors
from stretto.plan.options import Guidance
from stretto.workload.denoise import chunks_of


class Branches:
    """Evaluates denoiser calls over the cfg axis; exact steps also over the step axis, if asked."""

    def __init__(self, option: Guidance, mesh: Mesh, passes: Passes):
        self.option = option
        self.mesh = mesh
        self.passes = passes
        self._independent: set[tuple[str, int]] = set()
        self._distributed = False
        self._calls = 0
        self._rows = 0
        self._is_batched = False
        self._holds_whole_calls = False
        self._steps = 0

    def evaluate(self, call: Denoise, known: Any, *, share_step: bool) -> Any:
        """The call's true output; on cfg ranks > 0 of whole calls a remembered one may stand in.

        `known` is an earlier output of the same form, None on the first call of that form.
        """
        degree = self.mesh.size("cfg")
        share_step = share_step and known is not None and call.splits
        if degree == 1 or not call.splits:
            return self._over_steps(call, known) if share_step else self.passes.make(call)
        self._calls = max(self._calls, call.index + 1)
        self._rows = call.batch
        self.pass_over(call)
        if not self._is_whole(call):
            self._is_batched = True
            return self._batch(call, known, share_step)
        if known is None:
            return self.passes.make(call)
        return self._whole_call(call, known)

    def pass_over(self, call: Denoise) -> None:
        """Note the form of a call for which a remembered output may stand in on this rank."""
        self._holds_whole_calls = self._holds_whole_calls or self._is_whole(call)

    @property
    def holds_whole_calls(self) -> bool:
        """Whether ranks > 0 of the group hold placeholders for some calls of this step.

        Of this step alone: a pipeline may guide in some of its steps only.
        """
        return self._holds_whole_calls

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
            raise SplitMismatch(_idle(degree, self._calls, self._rows))
        self._steps += 1
        self._holds_whole_calls = False

    def _over_steps(self, call: Denoise, known: Any) -> Any:
        shared = exact.shared(call, known, self.mesh, self.passes)
        is_whole = chunks_of(call.batch, self.mesh.size("step")) == 1
        return shared if is_whole else self.passes.checked(call, shared)

    def _is_whole(self, call: Denoise) -> bool:
        return self.mesh.size("cfg") > 1 and call.splits and not self._takes_batch(call)

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
        if share_step:
            mine = exact.shared(part, known_part, self.mesh, self.passes)
        else:
            mine = self.passes.make(part)
        return self.passes.checked(call, mapped(self._gathered, mine))

    def _gathered(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.mesh.all_gather(tensor.contiguous(), "cfg", "guidance").wait())

    def _whole_call(self, call: Denoise, known: Any) -> Any:
        """Call k belongs to cfg rank k mod degree; the leader needs every output."""
        owner, own = call.index % self.mesh.size("cfg"), self.mesh.rank("cfg")
        self._distributed = True
        self._check_independent(call)
        output = self.passes.make(call) if own == owner else known
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


def _idle(degree: int, calls: int, rows: int) -> str:
    """Why ranks of the cfg axis have nothing to do, and what would give them something."""
    fitting = sorted({*divisors(rows), *range(1, calls + 1)} - {1})
    ways = [f"cfg={' or '.join(map(str, fitting))}"] if fitting else []
    if calls == 1 and 2 not in fitting:
        ways.append("cfg=2 with guidance on (it has two branches in most pipelines)")
    ways.append("cfg=1 and the ranks to step")
    return (
        f"cfg={degree}, but a step makes {calls} denoiser call(s) on a batch of {rows}, which "
        f"{degree} ranks cannot share\n"
        f"  why: cfg ranks share the branches of guidance, as calls or as rows of one batch; there "
        f"are fewer than {degree} calls, and {degree} does not divide {rows}\n"
        f"  to fix: {', or '.join(ways)}"
    )
