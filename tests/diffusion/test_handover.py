"""Between two scheduler steps: schedulers that return or keep unusual things."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AmusedScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from stretto.diffusion.api import emulate, parallelized
from stretto.errors import LatentsEdited
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Listed, Steps
from stretto.testing import models
from stretto.testing.exactness import Oracle, Recorder, emulated, on_ranks, reference
from stretto.testing.ranks import run_ranks
from stretto.testing.tiny import unet

WINDOWS = Listed(sizes=(1, 1, 3, 2, 1))


def exact(case, walk):
    """Whether windows with perfect guesses give the bits of the plain pipeline on every rank."""
    known = reference(case)
    assert known.degree_one
    known.pipe.set_progress_bar_config(disable=True)
    plan = Plan(step=Steps(degree=3, windows=WINDOWS, walk=walk, exact_split=False))
    with emulate(known.pipe, plan, predictors=[Oracle(known.guided) for _ in range(3)]) as run:
        case.call(known.pipe)
    return [torch.equal(case.tensor(result), known.output) for result in run.results]


def case_of(scheduler, **facts):
    return models._sd15(scheduler, scheduler, facts=facts)


@pytest.mark.parametrize("walk", ["replay", "leader"])
def test_a_sample_returned_twice_is_no_extra(walk):
    """TCD without noise (eta 0, the default of pipelines) returns its sample under two names."""
    assert all(exact(case_of("TCDScheduler"), walk))


@pytest.mark.parametrize("options", [{}, {"tau_func": lambda t: 0.5}], ids=["made", "given"])
def test_a_leader_sends_no_functions_of_its_scheduler(options):
    """SA-Solver keeps one made in its constructor, or one given to it; no pickle takes them."""
    case = models._sd15("sa", "SASolverScheduler", facts={"stochastic": True}, **options)
    assert all(exact(case, "leader"))


@pytest.mark.parametrize("walk", ["replay", "leader"])
def test_a_scheduler_inside_a_scheduler_has_a_history_too(walk):
    """UniPC may predict with another one and only correct by itself."""
    inner = PNDMScheduler(skip_prk_steps=True)
    assert all(exact(models._sd15("unipc", "UniPCMultistepScheduler", solver_p=inner), walk))


@pytest.mark.ranks
def test_a_leader_is_sent_part_of_a_prediction():
    """DiT predicts variances in further channels: what is left without them has gaps in memory."""
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=(1, 2, 2, 2, 1)), walk="leader"))
    expected, _ = emulated(models.OTHERS["dit"], plan)
    for rank in run_ranks(on_ranks, plan.sizes, ["dit"], plan):
        assert rank["dit"]["walk"] == "leader"
        assert torch.equal(rank["dit"]["output"], expected)


def test_a_pipeline_keeps_its_signature_inside():
    pipe = unet.sd15("EulerDiscreteScheduler")
    before = inspect.signature(type(pipe).__call__)
    with emulate(pipe, Plan(step=2)):
        assert inspect.signature(type(pipe).__call__) == before
        assert "generator" in inspect.signature(pipe.__call__).parameters


def in_place(first, scale=0.5):
    """A callback that writes into the latents themselves, from step `first` on."""

    def callback(pipe, i, t, values):
        if i >= first:
            values["latents"].mul_(scale)
        return values

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_latents_written_into_from_the_start_are_walked_by_a_leader(mode):
    """The tensor that the step returned comes back, with other values in it."""
    case = case_of("DDIMScheduler")
    pipe = case.pipeline()
    alone = Steps(degree=2, windows=Listed(sizes=(1,) * 8), exact_split=False)
    with mode():
        plain = case.call(pipe, **in_place(0))
        with emulate(pipe, Plan(step=alone)) as run:
            inside = case.call(pipe, **in_place(0))
    assert run.report.walk == "leader"
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_latents_written_into_later_are_refused(mode):
    case = case_of("DDIMScheduler")
    pipe = case.pipeline()
    with mode(), emulate(pipe, Plan(step=2)), pytest.raises(LatentsEdited, match="leader"):
        case.call(pipe, **in_place(3))


class IntoItsOwn(DiffusionPipeline):
    """Writes what a step returns into the latents that it gave: the whole, or behind fixed rows."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, rows=2, since=0, generator=None, **_):
        generator = torch.Generator().manual_seed(4)
        text = torch.randn(1, 6, 16, generator=generator)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(8)
        for index, t in enumerate(self.scheduler.timesteps):
            guided = self.unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]
            if index < since:
                latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
                continue
            moved = latents[:, :, rows:]
            moved.copy_(self.scheduler.step(guided[:, :, rows:], t, moved, return_dict=False)[0])
        return SimpleNamespace(images=latents)


def into_its_own(rows):
    def build():
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = IntoItsOwn(unet.sd15("EulerDiscreteScheduler").unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return replace(models.CASES["sd15-ddim"], build=build, inputs=lambda: {"rows": rows})


@pytest.mark.parametrize("walk", ["auto", "replay", "leader"])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_pipeline_may_overwrite_the_latents_that_it_gave(rows, walk):
    assert all(exact(into_its_own(rows), walk))


def test_latents_first_overwritten_inside_a_window_cannot_be_replayed():
    case = into_its_own(0)
    pipe = case.pipeline()
    steps = Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)))
    with emulate(pipe, Plan(step=steps)), pytest.raises(LatentsEdited, match=r"step 3: .* step 2"):
        case.call(pipe, since=2)


def _writes(how):
    """A scheduler that uses its arguments as its memory."""

    class Writes(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            (result,) = super().step(model_output, timestep, sample, return_dict=False)
            if how == "sample":
                return (sample.copy_(result),)
            model_output.mul_(0.5)
            return (result,)

    return Writes()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("walk", ["replay", "leader"])
@pytest.mark.parametrize("how", ["sample", "output"])
def test_a_scheduler_may_write_into_what_it_is_given(how, walk, mode):
    """Its steps are taken again in the replay, on what they were given before."""
    pipe = _Guided(_writes(how))
    plan = Plan(step=Steps(degree=3, windows=WINDOWS, walk=walk, exact_split=False))
    with mode():
        plain, recorder = pipe(), Recorder()
        with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0), predictor=recorder):
            assert torch.equal(pipe(), plain)
        oracles = [Oracle(recorder.guided) for _ in range(3)]
        with emulate(pipe, plan, predictors=oracles) as run:
            pipe()
        assert all(torch.equal(result, plain) for result in run.results)
        with emulate(pipe, plan) as run:
            pipe()
        assert all(torch.equal(result, run.results[0]) for result in run.results)


class _Guided:
    """Eight steps of a denoiser without weights."""

    _progress_bar_config = {}

    def __init__(self, scheduler, denoiser=None):
        self.scheduler = scheduler
        self.unet = denoiser or _Bent()

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self):
        self.scheduler.set_timesteps(8)
        x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t), t, x, return_dict=False)[0]
        return x


class _Bent(torch.nn.Module):
    def forward(self, x, t):
        return torch.tanh(x * 1.5 + t / 1000)


class _Graph(_Bent):
    """As a captured graph: every output lies where the one before lay."""

    output = None

    def forward(self, x, t):
        found = super().forward(x, t)
        if self.output is None:
            self.output = torch.empty_like(found)
        return self.output.copy_(found)


def graphs_and_not(mesh):
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=(1, 2, 1, 2, 2)), exact_split=False))
    found = []
    for denoiser in (_Bent(), _Graph()):
        pipe = _Guided(DDIMScheduler(clip_sample=False), denoiser)
        with torch.no_grad(), parallelized(pipe, plan, mesh=mesh):
            found.append(pipe())
    return found


@pytest.mark.ranks
def test_a_denoiser_may_use_the_memory_of_its_output_again():
    """Guesses are made from predictions of earlier steps, which must be there still."""
    (expected, _), _ = ranks = run_ranks(graphs_and_not, {"step": 2})
    assert all(torch.equal(result, expected) for found in ranks for result in found)


def test_virtual_ranks_may_share_the_memory_of_an_output():
    found = []
    for denoiser in (_Bent(), _Graph()):
        pipe = _Guided(DDIMScheduler(clip_sample=False), denoiser)
        with torch.no_grad():
            pipe()
            with emulate(pipe, Plan(step=3)) as run:
                pipe()
        found += run.results
    assert all(torch.equal(result, found[0]) for result in found)


class _Words(torch.nn.Module):
    """Logits of 12 words at 8 places, from words of which one is the mask."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedded = torch.randn(13, 16, generator=generator)
        self.mixed = torch.randn(8, 8, generator=generator) / 3
        self.out = torch.randn(16, 12, generator=generator)

    def forward(self, tokens, t):
        return torch.tanh(self.mixed @ self.embedded[tokens] + t / 10) @ self.out


class _Tokens(_Guided):
    def __call__(self, generator):
        self.scheduler.set_timesteps(8)
        x = torch.full((2, 8), 12)
        for t in self.scheduler.timesteps:
            logits = self.unet(x, t)
            x = self.scheduler.step(logits, t, x, generator=generator, return_dict=False)[0]
        return x


def seeded():
    return torch.Generator().manual_seed(0)


def test_tokens_are_latents_too():
    """Guesses of words are right or wrong: the error is that of a share of the 16."""
    pipe, recorder = _Tokens(AmusedScheduler(mask_token_id=12), _Words()), Recorder()
    plain = pipe(seeded())
    with parallelized(pipe, Plan(), mesh=LocalWorld({}).mesh(0), predictor=recorder):
        assert torch.equal(pipe(seeded()), plain)
    plan = Plan(step=Steps(degree=3, windows=WINDOWS, exact_split=False))
    oracles = [Oracle(recorder.guided) for _ in range(3)]
    with emulate(pipe, plan, predictors=oracles) as run:
        pipe(seeded())
    assert all(torch.equal(result, plain) for result in run.results)
    assert run.report.worst_discrepancy == 0
    with emulate(pipe, plan) as run:
        pipe(seeded())
    wrong = 16 * run.report.worst_discrepancy**2
    assert 1 <= round(wrong) <= 16
    assert wrong == pytest.approx(round(wrong))
