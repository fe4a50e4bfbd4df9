"""Predictions made on guessed latents, carried to the true ones at constant flow velocity."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from stretto.diffusion.api import emulate
from stretto.diffusion.predict import Extrapolation
from stretto.diffusion.scheduler import SchedulerPort
from stretto.diffusion.shipped.pipeline import ClassUNetPipeline
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Steps

WINDOWS = Listed(sizes=(1, 8, 8, 3))


def pipeline(scheduler):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=11,
    )
    return ClassUNetPipeline(unet, scheduler)


def straight(pipe):
    """Replace the network by one whose flow velocity is the same everywhere.

    Latents then move on straight lines x_f(s) = x_f(1) - (1 - s) v, whatever they are, so true
    latents do not depend on where a prediction was evaluated, if it is carried rightly.
    """
    scheduler = pipe.scheduler
    kind = scheduler.config.prediction_type
    grown = scheduler.init_noise_sigma > 1.001
    velocity = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def forward(sample, timestep, class_labels=None, return_dict=True):
        abar = scheduler.alphas_cumprod[int(torch.as_tensor(timestep).flatten()[0])].double()
        sigma = ((1 - abar) / abar).sqrt()
        s = sigma / (1 + sigma)
        # The network sees latents of unit variance with every scheduler.
        x = sample.double() / abar.sqrt() / (1 + sigma)
        noise, data = x + (1 - s) * velocity, x - s * velocity
        output = {
            "epsilon": noise,
            "sample": data,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * data,
        }[kind]
        return (output.to(sample.dtype),)

    pipe.unet.forward = forward
    assert grown == isinstance(scheduler, EulerDiscreteScheduler)
    return pipe


def run(pipe, steps=20):
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 2], num_inference_steps=steps, generator=generator, output_type="latent").images


class Wrong(Extrapolation):
    """Guesses that are off by a third, the same on all ranks."""

    def guesses(self, noise):
        generator = torch.Generator().manual_seed(1)
        known = super().guesses(noise)
        return [g + torch.randn(g.shape, generator=generator) / 3 for g in known]


def schedulers(kind):
    options = {"prediction_type": kind, "clip_sample": False}
    return {
        "ddim": DDIMScheduler(**options),
        "euler": EulerDiscreteScheduler(prediction_type=kind, timestep_spacing="leading"),
        "dpm++2m": DPMSolverMultistepScheduler(prediction_type=kind, solver_order=1),
    }


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_straight_flows_are_exact_however_bad_the_guesses(name, kind, monkeypatch):
    pipe = straight(pipeline(schedulers(kind)[name]))
    sequential = run(pipe)
    plan = Plan(step=Steps(degree=8, windows=WINDOWS, exact_split=False))

    def error():
        with emulate(pipe, plan, predictors=[Wrong(0) for _ in range(8)]):
            return float((run(pipe) - sequential).norm() / sequential.norm())

    assert error() < 2e-4
    monkeypatch.setattr(SchedulerPort, "carry", lambda self, noise: 0.0)
    assert error() > 2e-3


def test_flow_predictions_need_no_carrying():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert SchedulerPort(scheduler).carry(0.5) == 0.0


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.999999, 1.0])
def test_carry_is_finite_on_the_whole_grid(noise):
    for kind in ("epsilon", "sample", "v_prediction"):
        for scheduler in schedulers(kind).values():
            assert math.isfinite(SchedulerPort(scheduler).carry(noise))
