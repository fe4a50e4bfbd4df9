"""What step parallelism must know of a scheduler: its calls, its state, its noise grid.

Works on the *instance* and by signature, so that every scheduler with a `sample` argument fits.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from stretto.diffusion.kept import Kept, Watched, version_of
from stretto.diffusion.levels import Twins
from stretto.diffusion.solves import Solves
from stretto.errors import UnsupportedPipeline

#: Prediction types whose relation to flow velocity is known.
_CARRIED = ("epsilon", "sample", "v_prediction")
#: Arguments of a step that a scheduler might write into, and that are stepped again in a replay.
_GIVEN = ("sample", "model_output")
_BY_PLACE_OR_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
#: Attributes that the hooks put on the instance; they are no part of its state.
WRAPPED = ("step", "set_timesteps")


class StepCall:
    """One call of `scheduler.step`, with its arguments by name."""

    def __init__(self, named: dict[str, Any]):
        self.named = named

    @property
    def sample(self) -> Tensor:
        return self.named["sample"]

    @property
    def guided(self) -> Tensor:
        """The prediction the pipeline hands over, guidance already combined."""
        return self.named["model_output"]

    def replaced(self, **changes: Any) -> StepCall:
        """The same call with some arguments exchanged."""
        return StepCall({**self.named, **changes})


class SchedulerPort:
    """The original scheduler behind the hook: real steps, snapshots, results of any form."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self._step: Callable = scheduler.step
        self.signature = inspect.signature(scheduler.step)
        kinds = {name: p.kind for name, p in self.signature.parameters.items()}
        self._names = tuple(name for name, kind in kinds.items() if kind is _BY_PLACE_OR_NAME)
        named = {*self._names, *(n for n, kind in kinds.items() if kind is _BY_NAME)}
        #: Forms of calls that were found to fit the signature.
        self._fitting: set[tuple] = set()
        missing = {"sample", "model_output"} - named
        if missing:
            raise UnsupportedPipeline(
                f"{type(scheduler).__name__}.step{self.signature} has no {sorted(missing)}: "
                "step parallelism replays calls of the form step(model_output, t, sample); "
                "use a scheduler of that form, or Plan(cfg=...) alone"
            )
        self._last_result: Any = None
        #: Arguments that the scheduler was seen to write into: it gets copies.
        self._written: set[str] = set()
        self._kept: dict[int, Kept] = {}
        self._times = HostTimes()
        self._twins = Twins()
        self._solves = Solves(scheduler)
        self._levels: np.ndarray | None = None

    def bind(self, *args: Any, **kwargs: Any) -> StepCall:
        """A call by name. Raises TypeError for arguments that the scheduler does not take.

        Raises UnsupportedPipeline for arguments without a name.
        """
        form = (len(args), *kwargs)
        if form not in self._fitting:
            # Once: it takes longer than all the rest.
            self.signature.bind(*args, **kwargs)
            if len(args) > len(self._names):
                raise UnsupportedPipeline(
                    f"{type(self.scheduler).__name__}.step{self.signature} was given {len(args)} "
                    f"arguments by place, of which {len(self._names)} have names: steps are "
                    "replayed by name; give the rest by name"
                )
            self._fitting.add(form)
        return StepCall({**dict(zip(self._names, args, strict=False)), **kwargs})

    def real(self, call: StepCall) -> Any:
        """A true step of the scheduler; its form is remembered for `unmoved`."""
        time = call.named.get("timestep")
        if _is_on_device(time):
            call = call.replaced(timestep=self._times.on_host(time, self.scheduler.timesteps))
        if self._written:
            call = call.replaced(**{name: call.named[name].clone() for name in self._written})
        # Where writes are not counted only a copy tells; once, as the host waits for the answer.
        watch = Kept if self._last_result is None else Watched
        given = {name: watch(call.named[name]) for name in _GIVEN if name not in self._written}
        self._last_result = self._stepped(call)
        self._written.update(name for name, seen in given.items() if seen.is_written)
        return self._last_result

    def _stepped(self, call: StepCall) -> Any:
        """A step during which the scheduler has what makes the host wait for nobody."""
        own, lent = vars(self.scheduler), self._lent(call)
        kept = {name: own[name] for name in lent if name in own}
        own.update(lent)
        try:
            return self._step(**call.named)
        finally:
            # What the step itself has put there stays.
            for name in [name for name in lent if own.get(name) is lent[name]]:
                if name in kept:
                    own[name] = kept[name]
                else:
                    del own[name]

    def _lent(self, call: StepCall) -> dict[str, Any]:
        """Stand-ins with which a step has the same bits.

        They are for levels, if the step sends them to the latents' device, for timesteps on a
        device, in which a scheduler looks its first step up, and for methods that solve there.
        """
        own, found = vars(self.scheduler), {}
        levels = self._twins.of(own.get("sigmas"), call.sample.device)
        if levels is not None:
            found["sigmas"] = levels
        found.update(self._solves.on(call.sample.device))
        grid = own.get("timesteps")
        is_first = getattr(self.scheduler, "step_index", 0) is None
        if is_first and isinstance(grid, Tensor) and not _is_on_device(call.named.get("timestep")):
            # Else the host waits for the first evaluation, and then the device for the host, which
            # walks the guesses of the first window: 2.4 of 148 ms (H200, 7 evaluations of 20 ms).
            found["timesteps"] = self._times.read(grid)
        return found

    def unmoved(self, call: StepCall) -> Any:
        """What a real step would return in form and dtype, with the sample left as it is."""
        sample = call.sample.to(sample_of(self._last_result).dtype)
        return _with_sample(self._last_result, sample)

    def snapshot(self) -> dict[str, Any]:
        """The mutable state, for `restore`: schedulers keep histories and counters on themselves.

        What the snapshot before has copied, and nobody wrote into since, is not copied again.
        """
        # By identity: what is kept holds its tensor, so that no other can take over its id.
        found: dict[int, Kept] = {}

        def kept(tensor: Tensor) -> Kept:
            earlier = found.get(id(tensor)) or self._kept.get(id(tensor))
            if earlier is None or not earlier.is_untouched:
                earlier = Kept(tensor)
            found[id(tensor)] = earlier
            return earlier

        state = _mapped(kept, Tensor, self._own())
        self._kept = found
        return state

    def exported(self) -> dict[str, Any]:
        """A plain copy of the same, to send away."""
        return _mapped(Tensor.clone, Tensor, self._own())

    def restore(self, state: dict[str, Any]) -> None:
        """Put a snapshot or an exported state back; it can be used again."""
        state = _mapped(Kept.restored, Kept, state)
        own = vars(self.scheduler)
        for name in [n for n in own if n not in state and n not in WRAPPED]:
            del own[name]
        own.update(state)

    def _own(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.scheduler).items() if k not in WRAPPED}

    def begin(self) -> None:
        """A call of the pipeline begins."""
        self._solves.forget()

    def finish(self) -> None:
        """It ended. Raises torch.linalg.LinAlgError for what a step could not solve."""
        self._solves.check()

    def read_grid(self) -> None:
        """Fetch timesteps and noise levels to the host, before work is queued they would wait for.

        A GPU stood idle for 4 ms after the first step (H100), while the host, which had waited for
        it, walked the guesses of the first window.
        """
        grid = self._times.read(getattr(self.scheduler, "timesteps", None))
        self._levels = _sigmas(self.scheduler, grid)

    def host_grid(self) -> list[Tensor]:
        """Timesteps and noise levels on the host, as `read_grid` found them."""
        assert self._levels is not None, "the grid was read"
        times = self._times.read(getattr(self.scheduler, "timesteps", None))
        return [times, torch.as_tensor(self._levels)]

    def position(self, timestep: Any) -> int:
        """Index in `scheduler.timesteps` of a step that was just taken at `timestep`."""
        index = getattr(self.scheduler, "step_index", None)
        if index is not None:
            return int(index) - 1
        grid = self.scheduler.timesteps
        if isinstance(timestep, Tensor):
            timestep = self._times.on_host(timestep, grid)
        here = torch.as_tensor(timestep, device="cpu").flatten()[:1].double()
        matches = (self._times.read(grid).flatten().double() == here).nonzero().flatten()
        return int(matches[0]) if len(matches) else 0

    def noise(self, first: int, num_steps: int) -> list[float]:
        """Noise fractions s_0 .. s_N in [0, 1] of the steps from `first` on.

        Flow schedulers: s = sigma. Others: sigma / (1 + sigma), sigma = sqrt((1-a)/a) where only
        alphas_cumprod exists.
        """
        if self._levels is None:
            self.read_grid()
        assert self._levels is not None, "the grid was read"
        grid = [float(s) for s in self._levels[first : first + num_steps + 1]]
        grid += [0.0] * (num_steps + 1 - len(grid))
        if not _is_flow(self.scheduler):
            grid = [s / (1.0 + s) for s in grid]
        return [min(max(s, 0.0), 1.0) for s in grid]

    def carry(self, noise: float) -> float:
        """Change of a prediction with its latents at constant flow velocity, at a noise fraction.

        A prediction evaluated on guessed latents x' serves the true latents x as
        g + carry * (x - x'). Velocity depends on latents far less than noise does: holding
        epsilon lets an error of the latents grow by 1 / (1 - s) a step. 0 for flow schedulers.
        """
        kind = self.scheduler.config.get("prediction_type")
        if _is_flow(self.scheduler) or kind not in _CARRIED:
            return 0.0
        sigma = noise / max(1.0 - noise, 1e-6)
        # x / (1 + sigma) moves on straight lines; variance-preserving latents are smaller than x.
        grown = float(getattr(self.scheduler, "init_noise_sigma", 1.0)) > 1.001
        scale = (1.0 if grown else math.hypot(1.0, sigma)) / (1.0 + sigma)
        if kind == "v_prediction":
            scale *= (1.0 - sigma) / math.hypot(1.0, sigma)
        return scale


class HostTimes:
    """The host's copy of a scheduler's timesteps.

    Schedulers index tables of the host with the timestep; one that lives on the device would make
    them wait for it in every step.
    """

    def __init__(self) -> None:
        self._grid: Tensor | None = None
        self._version: int | None = None
        self._host = torch.empty(0)

    def read(self, grid: Any) -> Tensor:
        """A grid on the host, of the device's once only; empty for None."""
        if not isinstance(grid, Tensor):
            return torch.as_tensor([] if grid is None else grid, device="cpu")
        if grid is not self._grid or version_of(grid) != self._version:
            self._grid, self._version = grid, version_of(grid)
            self._host = grid.detach().cpu()
        return self._host

    def on_host(self, time: Tensor, grid: Any) -> Tensor:
        """The same value on the host if `time` is an item of `grid`, or of the grid seen before.

        An item is known by its memory, so a pipeline's own timesteps come back as they are.
        """
        for known in (grid, self._grid):
            if isinstance(known, Tensor) and _shares(time, known):
                return self.read(known)[time.storage_offset() - known.storage_offset()]
        return time


def _shares(item: Tensor, grid: Tensor) -> bool:
    """Whether a tensor without dims is an item of a contiguous grid of one dim."""
    return (
        item.ndim == 0
        and grid.ndim == 1
        and grid.is_contiguous()
        and item.dtype == grid.dtype
        and item.untyped_storage().data_ptr() == grid.untyped_storage().data_ptr()
        and 0 <= item.storage_offset() - grid.storage_offset() < len(grid)
    )


def _is_on_device(time: Any) -> TypeGuard[Tensor]:
    return isinstance(time, Tensor) and time.device.type != "cpu"


def sample_of(result: Any) -> Tensor:
    """The latents in what a scheduler's step returned."""
    return result[0]


def extras_of(result: Any) -> tuple:
    """Whatever else a step returned, in order; a pipeline may pass it to the next step."""
    return tuple(result) if isinstance(result, tuple) else tuple(result.values())


def _with_sample(result: Any, sample: Tensor) -> Any:
    if isinstance(result, tuple):
        return (sample, *result[1:])
    fields = dict(result)
    fields[next(iter(fields))] = sample
    return type(result)(**fields)


def _mapped(change: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """A value with `change` made to the items of a kind; containers, arrays, schedulers copied."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple, deque):
        return type(value)(_mapped(change, kind, item) for item in value)
    if type(value) is dict:
        return {key: _mapped(change, kind, item) for key, item in value.items()}
    if hasattr(value, "step") and hasattr(value, "set_timesteps"):
        # UniPC may predict with another scheduler, which has a history of its own.
        inner = copy.copy(value)
        vars(inner).update(_mapped(change, kind, vars(value)))
        return inner
    return value


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        "Flow" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _sigmas(scheduler: Any, grid: Tensor) -> np.ndarray:
    """Noise levels aligned with `grid`, the timesteps; one more than those where known."""
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = grid.double().numpy().reshape(-1)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return torch.as_tensor(sigmas, device="cpu").double().numpy()
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        # No noise level is known: an even grid still orders the steps.
        return np.linspace(1.0, 0.0, len(timesteps) + 1)
    alphas = torch.as_tensor(alphas, device="cpu").double().numpy()
    at = alphas[np.clip(timesteps.astype(int), 0, len(alphas) - 1)]
    # Grids of zero terminal signal start at alpha = 0, an infinite sigma.
    at = np.maximum(at, 1e-12)
    return np.sqrt((1.0 - at) / at)
