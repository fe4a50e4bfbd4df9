"""The run around the matrix: lengths, edits, callbacks, interrupts, faults and restoration."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from stretto.diffusion.api import emulate, parallelized
from stretto.diffusion.deferred import Aside
from stretto.diffusion.predict import Extrapolation
from stretto.errors import (
    ConfigError,
    HookDisplaced,
    IncompleteWindow,
    LatentsEdited,
    LaunchError,
    NonFinite,
    PlanMismatch,
    RankLost,
    SplitMismatch,
    UnsupportedPipeline,
)
from stretto.mesh.local import LocalMesh, LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Adaptive, Listed, Parastep, Steps, Tail
from stretto.testing import models
from stretto.testing.exactness import counted, declared
from stretto.testing.ranks import run_ranks

FLOW = models.CASES["sd3-flow"]
DDIM = models.CASES["sd15-ddim"]


def alone(plan):
    return LocalWorld(plan.sizes).mesh(0)


# ---- plans that do not fit -------------------------------------------------------------------


def test_mesh_and_plan_must_agree():
    context = parallelized(DDIM.pipeline(), Plan(step=2), mesh=alone(Plan()))
    with pytest.raises(PlanMismatch, match="the plan has step 2, the mesh step 1; make the mesh"):
        context.__enter__()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (Steps(degree=12), "12"),
        (Steps(degree=2, windows=Tail(depth=3)), "depth"),
        (Steps(degree=2, windows=Listed(sizes=(1, 2, 2))), "8"),
        (Steps(degree=2, windows=Listed(sizes=(2, 2, 2, 2))), "1"),
        (Steps(degree=2, windows=Listed(sizes=(1, 3, 2, 2))), "3"),
    ],
)
def test_windows_that_do_not_fit(steps, message):
    pipe = DDIM.pipeline()
    with emulate(pipe, Plan(step=steps)), pytest.raises(PlanMismatch, match=message):
        DDIM.call(pipe)


def test_a_pipeline_without_a_denoiser():
    pipe = DDIM.pipeline()
    context = parallelized(pipe, Plan(), mesh=alone(Plan()), denoiser="unett")
    with pytest.raises(UnsupportedPipeline, match=r"did you mean 'unet'"):
        context.__enter__()
    pipe.register_modules(unet=None)
    context = parallelized(pipe, Plan(), mesh=alone(Plan()))
    with pytest.raises(UnsupportedPipeline, match="has no denoiser that stretto recognises"):
        context.__enter__()


def test_nothing_to_split():
    case = models.CASES["flux-distilled"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(cfg=2)), pytest.raises(SplitMismatch, match="makes 1 denoiser call"):
        case.call(pipe)


@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [
        ("sd15-ddim", 1.0, "on a batch of 1, .*\n.*3 does not divide 1\n.*cfg=2 with guidance"),
        ("sd15-ddim", 7.5, "on a batch of 2, .*\n.*3 does not divide 2\n.*cfg=2, or cfg=1"),
    ],
    ids=["off", "on"],
)
def test_more_cfg_ranks_than_branches_says_how_many_there_are(name, scale, words):
    case = models.CASES[name]
    pipe = case.pipeline()
    with emulate(pipe, Plan(cfg=3)), pytest.raises(SplitMismatch, match=words):
        case.call(pipe, guidance_scale=scale)


def test_rows_that_depend_on_one_another_are_found():
    """An unknown class is checked once, joint against split."""
    pipe = DDIM.pipeline()
    plain = pipe.unet.forward

    def mixed(*args, **kwargs):
        rows = plain(*args, **kwargs)[0]
        return (rows + rows.flip(0) / 2,)

    pipe.unet.forward = mixed
    type_before = type(pipe)
    pipe.__class__ = type("UnknownPipeline", (type_before,), {})
    with emulate(pipe, Plan(cfg=2)), pytest.raises(SplitMismatch, match="rows depend"):
        DDIM.call(pipe)


# ---- pipelines that edit latents -------------------------------------------------------------


def test_inpainting_picks_the_leader_walk():
    case = models.CASES["sd15-inpaint"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(step=2)) as run:
        case.call(pipe)
    assert run.report.walk == "leader"


def test_forced_replay_of_an_editing_pipeline_is_refused():
    case = models.CASES["sd15-inpaint"]
    pipe = case.pipeline()
    plan = Plan(step=Steps(degree=2, walk="replay"))
    with emulate(pipe, plan), pytest.raises(LatentsEdited, match='Steps\\(walk="leader"\\)'):
        case.call(pipe)


def late_edit(pipe, i, t, tensors):
    return {"latents": tensors["latents"] * 1.01} if i == 3 else {}


def test_a_late_edit_is_refused_and_the_leader_walk_takes_it():
    pipe = DDIM.pipeline()
    with emulate(pipe, Plan(step=2)), pytest.raises(LatentsEdited):
        DDIM.call(pipe, callback_on_step_end=late_edit)
    sequential = DDIM.call(pipe, callback_on_step_end=late_edit)
    with emulate(pipe, Plan(step=Steps(degree=2, walk="leader"))):
        output = DDIM.call(pipe, callback_on_step_end=late_edit)
    assert (output - sequential).norm() < 0.1 * sequential.norm()


# ---- callbacks, interrupts, lengths ----------------------------------------------------------


def test_callbacks_know_provisional_latents():
    pipe = DDIM.pipeline()
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append(attached.provisional)
        return {}

    plan = Plan(step=Steps(degree=1, windows=Listed(sizes=(1,) * 8)))
    with parallelized(pipe, plan, mesh=alone(plan)) as attached:
        DDIM.call(pipe, callback_on_step_end=watch)
    assert seen == [False] * 8


@pytest.mark.parametrize("whose", ["given", "own"])
def test_an_interrupt_waits_for_the_end_of_its_window(whose):
    """Rank 0 asks inside a window; all ranks stop at the same step, on true latents.

    A callback may ask the pipeline it is given, or the one its maker knows.
    """
    pipe = DDIM.pipeline()
    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)), exact_split=False))

    def stop(given, i, t, tensors):
        if i == 2:
            (given if whose == "given" else pipe)._interrupt = True
        return {}

    with emulate(pipe, plan) as run:
        DDIM.call(pipe, callback_on_step_end=stop)
    assert [r.sizes for r in run.reports] == [(1, 3)] * 3


def test_a_loop_cut_short_inside_a_window_is_an_error():
    pipe = DDIM.pipeline()
    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)), exact_split=False))

    class Enough(Exception):
        pass

    def leave(pipe, i, t, tensors):
        if i == 2:
            raise Enough
        return {}

    with emulate(pipe, plan), pytest.raises(Enough):
        DDIM.call(pipe, callback_on_step_end=leave)


def test_timesteps_set_anew_inside_a_window():
    pipe = DDIM.pipeline()
    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)), exact_split=False))

    def regrid(pipe, i, t, tensors):
        if i == 2:
            pipe.scheduler.set_timesteps(8)
        return {}

    with emulate(pipe, plan), pytest.raises(IncompleteWindow, match="window of 3 steps"):
        DDIM.call(pipe, callback_on_step_end=regrid)


@pytest.mark.parametrize("walk", ["replay", "leader"])
def test_a_report_is_of_all_sections_of_a_call(walk):
    """A pipeline may denoise one section after another, with timesteps set anew for each."""
    pipe = DDIM.pipeline()
    plain = type(pipe)

    class Sections(plain):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    pipe.__class__ = Sections
    sizes = (1, 2, 2, 2, 1)
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=sizes), walk=walk))
    with emulate(pipe, plan) as run:
        DDIM.call(pipe)
        with counted(pipe) as seen:
            DDIM.call(pipe)
        for rank, report in enumerate(run.reports):
            assert (report.num_steps, report.sizes) == (16, 2 * sizes)
            assert [w.start for w in report.windows] == [0, 1, 3, 5, 7, 8, 9, 11, 13, 15]
            assert [w.discrepancy is not None for w in report.windows] == [
                w.size > 1 and walk == "replay" for w in report.windows
            ]
            if walk == "replay":
                sent = declared(report, rank, raw_bytes=2 * report.guided_bytes, chunks=2)
                assert report.traffic == sent
        assert sum(seen.values()) == sum(r.evaluations + r.structure_calls for r in run.reports)
        first, second = run.report.windows[1:4], run.report.windows[6:9]
        if walk == "replay":
            assert all(w.discrepancy > 0 for w in (*first, *second))


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_strength_starts_late(strength):
    case = models.CASES["sd15-img2img"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(step=2)) as run:
        case.call(pipe, strength=strength)
    assert sum(run.report.sizes) == run.report.num_steps == int(case.steps * strength)


def test_guidance_off():
    pipe = DDIM.pipeline()
    with emulate(pipe, Plan(step=2)) as run:
        DDIM.call(pipe, guidance_scale=1.0)
    assert run.report.depth < 8


def test_adaptive_windows_grow_and_agree():
    pipe = DDIM.pipeline()
    plan = Plan(step=Steps(degree=4, windows=Adaptive(tolerance=0.5), exact_split=False))
    with emulate(pipe, plan) as run:
        DDIM.call(pipe)
    assert len({r.sizes for r in run.reports}) == 1
    assert sum(run.report.sizes) == 8
    assert run.report.sizes[:2] == (1, 2)
    assert max(run.report.sizes) > 2


def test_the_report_measures_guesses():
    pipe = DDIM.pipeline()
    with emulate(pipe, Plan(step=3)) as run:
        DDIM.call(pipe)
    errors = [w.discrepancy for w in run.report.windows if w.size > 1]
    assert all(0 < e < 0.2 for e in errors)
    assert [w.discrepancy for w in run.reports[2].windows if w.size > 1] == errors


def test_the_published_guess_is_staler_than_the_newest():
    """`parastep` at p = 3 must differ from newest reuse on the same windows (brief 2)."""
    pipe = DDIM.pipeline()
    outputs = []
    for option, predictor in ((Parastep(warmup=2), "own"), (Listed(sizes=(1, 1, 3, 3)), "repeat")):
        plan = Plan(step=Steps(degree=3, windows=option, predictor=predictor, exact_split=False))
        with emulate(pipe, plan) as run:
            outputs.append(DDIM.call(pipe))
        assert run.report.sizes == (1, 1, 3, 3)
    assert not torch.equal(*outputs)


# ---- coexistence and restoration -------------------------------------------------------------


def test_two_pipelines_at_once():
    one, two = DDIM.pipeline(), FLOW.pipeline()
    plain = DDIM.call(one), FLOW.call(two)
    plan = Plan()
    with parallelized(one, plan, mesh=alone(plan)), parallelized(two, plan, mesh=alone(plan)):
        inside = DDIM.call(one), FLOW.call(two)
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])


def test_an_exception_restores_everything():
    pipe = DDIM.pipeline()
    before = type(pipe), set(vars(pipe.unet)), set(vars(pipe.scheduler))
    with pytest.raises(ZeroDivisionError), parallelized(pipe, Plan(), mesh=alone(Plan())):
        raise ZeroDivisionError
    assert (type(pipe), set(vars(pipe.unet)), set(vars(pipe.scheduler))) == before


def test_a_swapped_scheduler_is_refused():
    pipe, other = DDIM.pipeline(), DDIM.pipeline()
    with parallelized(pipe, Plan(), mesh=alone(Plan())):
        pipe.scheduler = other.scheduler
        with pytest.raises(HookDisplaced, match="replaced after"):
            DDIM.call(pipe)


def test_a_replaced_forward_is_refused():
    pipe = DDIM.pipeline()
    with parallelized(pipe, Plan(), mesh=alone(Plan())):
        pipe.unet.forward = lambda *args, **kwargs: None
        with pytest.raises(HookDisplaced):
            DDIM.call(pipe)


def test_step_caches_are_refused():
    pipe = models.CASES["flux-distilled"].pipeline()
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with emulate(pipe, Plan(step=2)), pytest.raises(UnsupportedPipeline, match="step cache"):
        models.CASES["flux-distilled"].call(pipe)


def test_a_deterministic_call_needs_no_generator_but_a_drawing_one_does():
    case = models.CASES["sd15-euler-ancestral"]
    pipe = case.pipeline()
    with emulate(pipe, Plan(step=2)), pytest.raises(UnsupportedPipeline, match="pass generator"):
        case.call(pipe, generator=None)


# ---- faults ----------------------------------------------------------------------------------


def test_nan_is_named():
    pipe = DDIM.pipeline()
    plain = pipe.unet.forward
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        out = plain(*args, **kwargs)
        return (out[0] * float("nan"),) if len(calls) == 4 else out

    pipe.unet.forward = poisoned
    plan = Plan(step=Steps(degree=2, exact_split=False))
    with emulate(pipe, plan), pytest.raises(NonFinite, match="holds NaN or infinity"):
        DDIM.call(pipe)


def faulty(mesh, kind):
    """One rank misbehaves at its third denoiser call; the others report what they saw."""
    pipe = DDIM.pipeline()
    pipe.set_progress_bar_config(disable=True)
    seed = mesh.world_rank if kind == "seed" else 0
    if kind != "seed" and mesh.world_rank == 1:
        plain, calls = pipe.unet.forward, []

        def broken(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "stall":
                    signal.pause()
                raise ArithmeticError("no such luck")
            return plain(*args, **kwargs)

        pipe.unet.forward = broken
    plan = Plan(step=Steps(degree=2, exact_split=False))
    prompt = DDIM.inputs()
    if kind == "seed":
        key = "prompt_embeds"
        prompt[key] = prompt[key] + seed
    with parallelized(pipe, plan, mesh=mesh, debug=True):
        DDIM.call(pipe, **prompt)


@pytest.mark.ranks
def test_a_rank_that_raises():
    with pytest.raises(LaunchError, match="rank 1 raised ArithmeticError: no such luck"):
        run_ranks(faulty, {"step": 2}, "raise", timeout_s=150, mesh_timeout_s=20)


def told(mesh, body, *arguments):
    """What a rank ended with, and whether the mesh is still of use."""
    try:
        body(mesh, *arguments)
    except (ArithmeticError, RankLost, ConfigError) as error:
        said = f"{type(error).__name__}: {error}"
    try:
        mesh.barrier()
    except RankLost:
        return said, False
    return said, True


@pytest.mark.ranks
def test_a_rank_that_raises_inside_a_window_ends_the_waits_of_the_others():
    """They hear of it long before their deadline, which is beyond that of this test."""
    limits = {"timeout_s": 150, "mesh_timeout_s": 300}
    waiting, raising = run_ranks(told, {"step": 2}, faulty, "raise", **limits)
    assert raising == ("ArithmeticError: no such luck", False)
    assert waiting[0].startswith("RankLost")
    assert "step 4: ArithmeticError: no such luck" in waiting[0]


def too_little_damping(mesh):
    """Rank 0 guesses nothing in a flow, so it sees nothing of it."""
    pipe = FLOW.pipeline()
    windows = Listed(sizes=(1, 1, 3, 3), damping=(0.5,))
    with parallelized(pipe, Plan(step=Steps(degree=3, windows=windows)), mesh=mesh):
        FLOW.call(pipe)


@pytest.mark.ranks
def test_what_only_guessing_ranks_refuse_ends_the_waits_of_the_others():
    limits = {"timeout_s": 150, "mesh_timeout_s": 300}
    waiting, *raising = run_ranks(told, {"step": 3}, too_little_damping, **limits)
    assert waiting[0].startswith("RankLost")
    assert "stored damping has 1 horizons, a window asks for 2" in waiting[0]
    assert all(said.startswith("ConfigError: stored damping") for said, _ in raising)
    assert not any(usable for _, usable in (waiting, *raising))


def breaking_in_its_text_encoder(mesh, ranks):
    """Raises before any denoiser call, on some ranks or on all."""
    pipe = DDIM.pipeline()

    def broken(*args, **kwargs):
        raise ArithmeticError("no such luck")

    if mesh.world_rank in ranks:
        pipe.encode_prompt = broken
    with parallelized(pipe, Plan(step=2), mesh=mesh):
        DDIM.call(pipe)


@pytest.mark.ranks
def test_a_rank_that_raises_before_its_first_call_ends_the_waits_of_the_others():
    limits = {"timeout_s": 150, "mesh_timeout_s": 300}
    waiting, raising = run_ranks(told, {"step": 2}, breaking_in_its_text_encoder, (1,), **limits)
    assert raising == ("ArithmeticError: no such luck", False)
    assert waiting[0].startswith("RankLost")
    assert "rank 1 ended before it, ArithmeticError: no such luck" in waiting[0]


@pytest.mark.ranks
def test_what_all_ranks_raise_before_their_first_call_leaves_the_mesh_alone():
    body = breaking_in_its_text_encoder
    outcomes = run_ranks(told, {"step": 2}, body, (0, 1), timeout_s=150)
    assert outcomes == [("ArithmeticError: no such luck", True)] * 2


def unguided(mesh):
    """A pipeline whose batch of one cannot be cut in two."""
    pipe = DDIM.pipeline()
    with parallelized(pipe, Plan(cfg=2), mesh=mesh):
        DDIM.call(pipe, guidance_scale=1.0)


@pytest.mark.ranks
def test_what_all_ranks_refuse_leaves_the_mesh_alone():
    outcomes = run_ranks(told, {"cfg": 2}, unguided, timeout_s=150)
    for said, usable in outcomes:
        assert said.startswith("SplitMismatch: cfg=2")
        assert usable


@pytest.mark.ranks
def test_a_rank_that_dies():
    with pytest.raises((RankLost, LaunchError), match="rank 1"):
        run_ranks(faulty, {"step": 2}, "kill", timeout_s=150, mesh_timeout_s=20)


@pytest.mark.ranks
def test_a_rank_that_stalls():
    """The error comes from the rank that waits, and says what the silent one was doing."""
    with pytest.raises(LaunchError, match=r"lost: rank 1 \(.*evaluating step 4"):
        run_ranks(faulty, {"step": 2}, "stall", timeout_s=60, mesh_timeout_s=5)


@pytest.mark.ranks
def test_ranks_with_unequal_inputs():
    with pytest.raises(LaunchError, match="RanksDisagree"):
        run_ranks(faulty, {"step": 2}, "seed", timeout_s=150)


def test_waits_are_long_in_the_first_window_only(monkeypatch):
    """Each may take what was asked for; kernels that load at their first use take longer."""
    allowed = []
    monkeypatch.setattr(
        LocalMesh, "allow", lambda mesh, s: allowed.append(s) or setattr(mesh, "timeout_s", s)
    )
    pipe = FLOW.pipeline()
    with emulate(pipe, Plan(step=2), timeout_s=60) as run:
        FLOW.call(pipe)
    assert run.report.sizes.count(2) > 1
    assert allowed[:2] == [180, 180]
    assert set(allowed[2:]) == {60}


# ---- memory of a second stream ---------------------------------------------------------------


class Noted(Aside):
    """Notes what is inside as used."""

    used = ()

    @contextmanager
    def work(self, *used):
        before, self.used = self.used, used
        yield
        self.used = before


class Listening(Extrapolation):
    """Learns only where its memory is safe, and notes when."""

    def __init__(self, asides):
        super().__init__(1, fitted=True)
        self.asides, self.learned = asides, 0

    def append(self, s, g):
        assert any(g is used for aside in self.asides for used in aside.used)
        self.learned += 1
        super().append(s, g)


@pytest.mark.parametrize("case", [FLOW, DDIM], ids=["flow", "carried"])
@pytest.mark.parametrize("walk", ["replay", "leader"])
def test_a_predictor_learns_on_the_second_stream_alone(case, walk, monkeypatch):
    """What it made for exact steps is read there later, and dropped while it is read."""
    asides = []
    monkeypatch.setattr("stretto.diffusion.api.Aside", lambda: asides.append(Noted()) or asides[-1])
    predictors = [Listening(asides) for _ in range(2)]
    pipe = case.pipeline()
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=(1, 1, 2, 1, 2, 1)), walk=walk))
    with emulate(pipe, plan, predictors=predictors):
        case.call(pipe)
    assert [predictor.learned for predictor in predictors] == [8, 8]
