"""O4: the hooks on a bare pipeline agree with the NumPy twin to 1e-12 in float64.

The pipeline, its scheduler and its network are written out here: what stretto needs of a pipeline
is a call, components and a scheduler, not diffusers.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from stretto.diffusion import naive
from stretto.diffusion.api import emulate
from stretto.diffusion.scheduler import SchedulerPort
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Parastep, Steps
from stretto.search import windows as search

NUM_STEPS = 20


class Euler:
    """x + (sigma' - sigma) g: flow latents for velocities, growing ones for epsilon."""

    def __init__(self, kind):
        self.config = {"prediction_type": kind}
        top = 1.0 if kind == "flow_prediction" else 20.0
        self.init_noise_sigma = top
        self.sigmas = torch.linspace(top, 0, NUM_STEPS + 1, dtype=torch.float64)
        self.timesteps = torch.arange(NUM_STEPS)

    def step(self, model_output, timestep, sample):
        change = self.sigmas[timestep + 1] - self.sigmas[timestep]
        return (sample + change * model_output,)


class Mixture(torch.nn.Module):
    """Exact prediction for data drawn from round Gaussians of width 0.2."""

    def __init__(self, scheduler, num_parts=5, dims=12):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.centres_KD = torch.randn(num_parts, dims, generator=generator, dtype=torch.float64)
        self.sigmas = scheduler.sigmas
        self.is_flow = scheduler.config["prediction_type"] == "flow_prediction"

    def forward(self, x_ND, i):
        sigma = self.sigmas[i]
        kept = 1 - sigma if self.is_flow else torch.ones_like(sigma)
        variance = (kept * 0.2) ** 2 + sigma**2
        offset_NKD = x_ND[:, None] - kept * self.centres_KD
        weight_NK = torch.softmax(-(offset_NKD**2).sum(-1) / (2 * variance), dim=1)
        part_NKD = self.centres_KD + kept * 0.04 / variance * offset_NKD
        data_ND = (weight_NK[..., None] * part_NKD).sum(1)
        return ((x_ND - data_ND) / sigma,)


class Pipeline:
    def __init__(self, kind):
        self.scheduler = Euler(kind)
        self.unet = Mixture(self.scheduler)

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self, x):
        trace = [x]
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t)[0], t, x)[0]
            trace.append(x)
        return x


@pytest.fixture(params=["flow_prediction", "epsilon"])
def pipe(request):
    return Pipeline(request.param)


def problem(pipe):
    """The same arithmetic for the twin."""
    sigmas = pipe.scheduler.sigmas.numpy()

    def denoise(x, i):
        return pipe.unet(torch.from_numpy(x), torch.tensor(i))[0].numpy()

    def step(x, g, i):
        return x + (sigmas[i + 1] - sigmas[i]) * g

    x = np.random.default_rng(5).normal(size=(4, 12)) * sigmas[0]
    noise = SchedulerPort(pipe.scheduler).noise(0, NUM_STEPS)
    return denoise, step, x, noise


def close(output, latents):
    scale = np.abs(latents[-1]).max()
    return np.abs(output.numpy() - latents[-1]).max() <= 1e-12 * scale


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("guess", ["repeat", "damped"])
def test_replay(pipe, degree, guess):
    denoise, step, x, noise = problem(pipe)
    port = SchedulerPort(pipe.scheduler)
    carry = [port.carry(s) for s in noise]
    sizes = search.tail(noise, degree)
    twin = naive.replay(denoise, step, x, sizes, noise, getattr(naive, guess), carry)
    option = Steps(degree=degree, windows=Listed(sizes=sizes), predictor=guess, exact_split=False)
    with emulate(pipe, Plan(step=option)):
        output = pipe(torch.from_numpy(x))
    assert close(output, twin)
    assert not close(output, naive.sequential(denoise, step, x, NUM_STEPS))


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_published(pipe, degree):
    """`parastep`, with the stale own outputs and the short last cycle."""
    denoise, step, x, _ = problem(pipe)
    twin = naive.published(denoise, step, x, NUM_STEPS, degree, 5)
    option = Steps(degree=degree, windows=Parastep(warmup=5))
    with emulate(pipe, Plan(step=option)):
        output = pipe(torch.from_numpy(x))
    assert close(output, twin)


def test_the_twin_notices_a_missing_carry():
    pipe = Pipeline("epsilon")
    denoise, step, x, noise = problem(pipe)
    sizes = search.tail(noise, 4)
    with_carry, without = (
        naive.replay(denoise, step, x, sizes, noise, naive.repeat, carry)
        for carry in ([SchedulerPort(pipe.scheduler).carry(s) for s in noise], None)
    )
    assert not np.allclose(with_carry[-1], without[-1], rtol=1e-6)


def test_noise_falls():
    for kind in ("flow_prediction", "epsilon"):
        noise = SchedulerPort(Pipeline(kind).scheduler).noise(0, NUM_STEPS)
        assert all(a > b for a, b in pairwise(noise))
