"""Every tiny pipeline repeats bitwise, depends on its seed, and is what its facts say."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from stretto.testing.models import CASES, OTHERS

# diffusers' KDPM2 and LMS schedulers call numpy the old way, some 30 000 warnings.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

ALL = {**CASES, **OTHERS}


@dataclass
class Seen:
    """What a watched generation did: denoiser calls per scheduler step, rows, edits, draws."""

    calls: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    modules: set[torch.nn.Module] = field(default_factory=set)
    edited: bool = False
    drew: bool = False
    pending: int = 0
    last: torch.Tensor | None = None


def _rows(args, kwargs) -> int:
    first = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
    return first[0].shape[0] if isinstance(first, list) else first.shape[0]


def _random_state(args, kwargs) -> list[torch.Tensor]:
    found = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    return [torch.get_rng_state(), *(generator.get_state() for generator in found)]


@contextmanager
def watch(case, pipe):
    """Record a generation of `pipe` into the returned `Seen`."""
    seen = Seen()

    def before_call(module, args, kwargs):
        seen.pending += 1
        seen.modules.add(module)
        seen.rows.append(_rows(args, kwargs))

    step = pipe.scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched(*args, **kwargs):
        sample = signature.bind(*args, **kwargs).arguments["sample"]
        seen.calls.append(seen.pending)
        seen.pending = 0
        if seen.last is not None and not torch.equal(sample, seen.last.to(sample.dtype)):
            seen.edited = True
        before = _random_state(args, kwargs)
        result = step(*args, **kwargs)
        after = _random_state(args, kwargs)
        seen.drew |= not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen.last = result[0].clone()
        return result

    modules = [getattr(pipe, name) for name in case.denoisers]
    hooks = [m.register_forward_pre_hook(before_call, with_kwargs=True) for m in modules]
    pipe.scheduler.step = watched
    try:
        yield seen
    finally:
        del pipe.scheduler.step
        for hook in hooks:
            hook.remove()


@contextmanager
def disturbed(case, pipe, call=3):
    """Add one to the denoiser's output in its `call`-th call."""
    count = 0

    def after_call(module, args, output):
        nonlocal count
        count += 1
        if count != call:
            return output
        return (output[0] + 1.0, *output[1:]) if isinstance(output, tuple) else _bumped(output)

    hooks = [getattr(pipe, name).register_forward_hook(after_call) for name in case.denoisers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert count >= call


def _bumped(output):
    output.sample = output.sample + 1.0
    return output


# The matrix proper stays in the plain lane, except schedulers with a near twin there.
SLOW = {*OTHERS, "sd15-kdpm2", "sd15-heun", "sd15-deis", "sd15-pndm", "sd15-euler-karras"}
SLOW |= {"wan-flow", "svd", "cogvideox-ddim", "sdxl-euler", "sd15-ddim-v", "sd15-lms"}

EVERY = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(ALL)
]


@pytest.fixture(autouse=True)
def one_thread():
    """A thread pool slows tiny tensors down and takes cores from other workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EVERY)
def test_repeats_bitwise_and_depends_on_the_seed(name):
    case = ALL[name]
    state = torch.get_rng_state()
    pipe, twin = case.pipeline(), case.pipeline()
    assert torch.equal(torch.get_rng_state(), state), "building drew from the global generator"
    first = case.call(pipe, seed=3)
    assert torch.isfinite(first).all()
    assert torch.equal(case.call(pipe, seed=3), first)
    assert torch.equal(case.call(twin, seed=3), first)
    assert not torch.equal(case.call(pipe, seed=4), first)


@pytest.mark.parametrize("name", EVERY)
def test_facts_are_those_of_a_run_and_the_denoiser_matters(name):
    case = ALL[name]
    pipe = case.pipeline()
    with watch(case, pipe) as seen:
        plain = case.call(pipe)
    assert type(pipe.scheduler).__name__ == case.scheduler
    assert seen.modules == {getattr(pipe, name) for name in case.denoisers}
    assert max(seen.calls) == case.calls_per_step
    assert seen.edited == case.edits
    assert seen.drew == case.stochastic
    # Every case generates one item, so only batched guidance shows the denoiser two rows.
    assert max(seen.rows) == (2 if case.batched else 1)
    assert case.guidance != "calls" or case.calls_per_step > 1
    with disturbed(case, pipe):
        assert not torch.equal(case.call(pipe), plain)


def test_reading_the_registry_imports_no_diffusers():
    code = "import sys, stretto.testing.models; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_fact_is_seen():
    """The watch tells an editing pipeline from a plain one, and noise from none."""
    kinds = {}
    for name in ("sd15-ddim", "sd15-inpaint", "sd15-ddpm"):
        pipe = CASES[name].pipeline()
        with watch(CASES[name], pipe) as seen:
            CASES[name].call(pipe)
        kinds[name] = (seen.edited, seen.drew)
    assert kinds == {
        "sd15-ddim": (False, False),
        "sd15-inpaint": (True, False),
        "sd15-ddpm": (False, True),
    }
