"""`parallelize`: bind a plan and a mesh to a model's attention, and undo it.

Nothing is patched globally: every change is on the model given, so two models may run under two
plans in one process.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from stretto.errors import ConfigError, PlanMismatch, UnsupportedModel
from stretto.parallel import sdpa
from stretto.parallel.context import Attention, Binding, check_degree
from stretto.plan.context import Context, of_sequence

if TYPE_CHECKING:
    from stretto.mesh.mesh import Mesh
    from stretto.plan.model import Plan


#: Under this name a bound model holds its handle: what is bound stays so while nobody keeps that.
_HANDLE = "_stretto_handle"


class Parallelized:
    """A model under a plan. Leaving the `with` block, or `undo()`, restores it.

    Until then the model stays bound, whether or not this handle is kept. `bound` names the modules
    whose attention runs over `mesh`; empty for a model of transformers that was not examined.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, stack: contextlib.ExitStack, bound: Sequence[str]
    ):
        self.model = model
        self.mesh = mesh
        self.bound = tuple(bound)
        self._stack = stack
        # Past nn.Module's own attributes: a handle is no part of the model's state.
        model.__dict__[_HANDLE] = self

    def __deepcopy__(self, memo: dict) -> Parallelized:
        """Of a copied model the modules are copies, and what undoes the original is not."""
        return self

    def __enter__(self) -> Parallelized:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the model; a second call does nothing."""
        if self.model.__dict__.get(_HANDLE) is self:
            del self.model.__dict__[_HANDLE]
        self._stack.close()


def parallelize(
    model: nn.Module, plan: Plan | Context, *, mesh: Mesh, check: bool = True
) -> Parallelized:
    """Bind every attention of `model` to `plan` and `mesh`; its inputs are shards from then on.

    Takes models of transformers (inputs from `stretto.shard`), transformers of diffusers with a
    `_cp_plan` (whole inputs and outputs, split and gathered inside), and torch modules that hold
    `Attention` modules or call torch SDPA. Results, losses summed over ranks and gradients summed
    over ranks equal those of one device. `check` False skips what finds mixing outside attention
    and ignored positions: for models of transformers a few short forward passes.

    Returns a handle that is a context manager and has `undo()`. Raises PlanMismatch when plan and
    mesh differ, UnsupportedModel, naming the module and the reason, for what would not be exact,
    ConfigError for what is no module or no mesh.
    """
    if not isinstance(model, nn.Module):
        what = "the class, not a model" if isinstance(model, type) else "no torch module"
        raise ConfigError(
            f"model={model!r} is {what}\n"
            "  why: attention is found in, and bound to, the modules of a model that exists\n"
            "  to fix: a torch.nn.Module; for a pipeline of diffusers stretto.parallelized"
        )
    context = _context(plan)
    check_degree(context, mesh)
    binding = Binding(mesh, context)
    with contextlib.ExitStack() as stack:
        names = _bind(model, binding, stack, check)
        return Parallelized(model, mesh, stack.pop_all(), names)


def _context(plan: Plan | Context) -> Context:
    context = of_sequence(plan)
    others = [axis for axis in ("step", "cfg") if plan.sizes.get(axis, 1) > 1]
    if others:
        raise PlanMismatch(
            f"parallelize splits the sequence, the plan also has {', '.join(others)}: those belong "
            "to pipelines, see stretto.parallelized"
        )
    return context


def _bind(
    model: nn.Module, binding: Binding, stack: contextlib.ExitStack, check: bool
) -> list[str]:
    from stretto.parallel.layouts import causal_lm, denoisers

    if causal_lm.is_model(model):
        return _bind_language_model(model, binding, stack, check)
    if denoisers.is_model(model):
        return denoisers.bind(model, binding, stack, check=check)
    explicit = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
    calling = [name for name in sdpa.callers(model) if name not in explicit]
    if not explicit and not calling:
        raise UnsupportedModel(
            f"{type(model).__name__} holds no attention that is known here: neither stretto's "
            "Attention modules nor modules whose forward calls scaled_dot_product_attention"
        )
    if check:
        sdpa.check(model)
    _bind_explicit(explicit, binding, stack)
    for name in calling:
        part = model.get_submodule(name)
        stack.enter_context(sdpa.scoped(part, name, binding, lambda args, kwargs: False))
    return [*explicit, *calling]


def _bind_explicit(
    parts: Mapping[str, Attention], binding: Binding, stack: contextlib.ExitStack
) -> None:
    for name, part in parts.items():
        if part.mesh is not None:
            raise UnsupportedModel(
                f"{name} is bound to a plan already\n  to fix: undo that one first"
            )
    for part in parts.values():
        part.mesh, part.plan = binding.mesh, binding.plan
        stack.callback(part.release)


def _bind_language_model(
    model: nn.Module, binding: Binding, stack: contextlib.ExitStack, check: bool
) -> list[str]:
    from stretto.parallel import probe
    from stretto.parallel.layouts import causal_lm
    from stretto.parallel.layouts.entrance import Entrance

    causal_lm.check(model)
    stack.enter_context(causal_lm.bound(model, binding))
    if "position_ids" not in causal_lm.parameters(model):
        for part in causal_lm.position_tables(model):
            stack.callback(causal_lm.told(part, binding).remove)
    found = probe.examine(model, binding) if check else probe.Findings()
    signature = inspect.signature(model.forward)
    entrance = Entrance(binding, signature, found.origin, found.sums_loss)
    handle = model.register_forward_pre_hook(entrance, with_kwargs=True)
    stack.callback(handle.remove)
    return list(found.layers)
