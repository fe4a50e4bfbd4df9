"""What would be silently wrong, hang or leak without a guard, each once."""

import copy
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from stretto.diffusion import naive
from stretto.diffusion.api import _modes, emulate, parallelized
from stretto.diffusion.denoise import NEVER_SPLIT, Denoise
from stretto.errors import (
    IncompleteWindow,
    NonFinite,
    PlanMismatch,
    RanksDisagree,
    SplitMismatch,
    UnsupportedPipeline,
)
from stretto.mesh.local import LocalWorld
from stretto.plan.model import Plan
from stretto.plan.options import Adaptive, Fixed, Listed, Parastep, Steps
from stretto.search import windows as search
from stretto.testing import models
from stretto.testing.exactness import counted
from tests.diffusion.test_against_naive import NUM_STEPS, Pipeline, close, problem

DDIM = models.CASES["sd15-ddim"]


def alone():
    return LocalWorld({}).mesh(0)


def unknown(pipe):
    """The same pipeline under a class that no table vouches for."""
    pipe.__class__ = type("UnknownPipeline", (type(pipe),), {})
    return pipe


@pytest.mark.parametrize("name", ["wan-flow", "flux-true-cfg"])
def test_published_guesses_with_guidance_by_calls(name):
    """The published guess recombines branches: those of the leader, not placeholders."""
    case = models.CASES[name]
    pipe = case.pipeline()
    outputs = []
    for cfg in (1, 2):
        with emulate(pipe, Plan(step=Steps(degree=2, windows=Parastep()), cfg=cfg)):
            case.call(pipe)
            outputs.append(case.call(pipe))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("steps", [{3, 4}, {3, 4, 5}, {4, 5, 6, 7}], ids=str)
def test_published_guesses_where_guidance_is_off_for_some_steps(steps):
    """A batch of both branches and a call of one alternate; the second has one owner."""

    def guide(pipe, i, t, tensors):
        is_on = i + 1 not in steps
        if is_on != pipe.do_classifier_free_guidance:
            pipe._guidance_scale = 5.0 if is_on else 0.0
            embeds = tensors["prompt_embeds"]
            tensors["prompt_embeds"] = torch.cat([embeds - 1, embeds]) if is_on else embeds[1:]
        return tensors

    told = {"callback_on_step_end": guide, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe, outputs = DDIM.pipeline(), []
    for cfg in (1, 2):
        with emulate(pipe, Plan(step=Steps(degree=2, windows=Parastep()), cfg=cfg)):
            DDIM.call(pipe, **told)
            outputs.append(DDIM.call(pipe, seed=1, **told))
    one, two = outputs
    assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("plan", [Plan(), Plan(cfg=2)], ids=str)
def test_an_interrupt_without_windows(plan):
    pipe = DDIM.pipeline()

    def stop(pipe, i, t, tensors):
        pipe._interrupt = i >= 1
        return {}

    with emulate(pipe, plan) as run:
        DDIM.call(pipe, callback_on_step_end=stop)
    assert [r.num_steps for r in run.reports] == [2] * plan.world_size


def test_only_rank_zero_interrupts():
    """All cfg and step ranks stop at the same step although one of them asked."""
    pipe = DDIM.pipeline()
    asked = []

    def stop(pipe, i, t, tensors):
        if i == 2 and not asked:
            asked.append(1)
            pipe._interrupt = True
        return {}

    sizes = (1, 2, 2, 2, 1)
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=sizes), exact_split=False), cfg=2)
    with emulate(pipe, plan, timeout_s=20) as run:
        DDIM.call(pipe, callback_on_step_end=stop)
    assert len({r.sizes for r in run.reports}) == 1


def test_waits_are_long_until_the_first_window_has_closed():
    """Until then kernels load; a rank that stalls later is found in the time that was asked for."""

    def body(mesh):
        pipe, seen = DDIM.pipeline(), []
        pipe.set_progress_bar_config(disable=True)

        def watch(pipe, i, t, tensors):
            seen.append(mesh.timeout_s)
            return {}

        with parallelized(pipe, plan, mesh=mesh):
            DDIM.call(pipe, callback_on_step_end=watch)
        return seen

    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 1, 2, 1)), exact_split=False))
    assert LocalWorld(plan.sizes, timeout_s=20).run(body) == [[60] * 3 + [20] * 5] * 3


@pytest.mark.parametrize("unlike", ["prompt", "size"])
@pytest.mark.parametrize("plan", [Plan(cfg=2), Plan(step=2)], ids=str)
def test_unlike_calls_are_named_before_ranks_exchange(plan, unlike):
    """Two pictures would be blended, or tensors of two sizes be taken for one."""

    def body(mesh):
        pipe, inputs = DDIM.pipeline(), DDIM.inputs()
        pipe.set_progress_bar_config(disable=True)
        if mesh.world_rank and unlike == "prompt":
            inputs["prompt_embeds"] = inputs["prompt_embeds"] + 1
        elif mesh.world_rank:
            inputs |= {"height": 32, "width": 32}
        with parallelized(pipe, plan, mesh=mesh):
            DDIM.call(pipe, **inputs)

    with pytest.raises(RanksDisagree, match=r"first denoiser call: rank \d has inputs"):
        LocalWorld(plan.sizes, timeout_s=20).run(body)


@pytest.mark.parametrize("plan", [Plan(cfg=2), Plan(step=2)], ids=str)
@pytest.mark.parametrize(
    ("name", "unlike"),
    [
        ("sd15-ddim", {"guidance_scale": 3.0}),  # never reaches the denoiser
        ("sd3-flow", {"num_inference_steps": 10}),  # begins at the same timestep
        ("sd15-ddim", {"eta": 0.5}),
    ],
    ids=lambda value: str(value),
)
def test_numbers_that_differ_between_ranks_are_named(plan, name, unlike):
    case = models.CASES[name]

    def body(mesh):
        pipe = case.pipeline()
        pipe.set_progress_bar_config(disable=True)
        with parallelized(pipe, plan, mesh=mesh):
            with pytest.raises(RanksDisagree, match=f"{next(iter(unlike))}: rank 0 .* rank 1"):
                case.call(pipe, **(unlike if mesh.world_rank else {}))
            # Refused on every rank before anything was sent: the mesh is of use.
            case.call(pipe, output_type="latent" if mesh.world_rank else "pt")

    LocalWorld(plan.sizes, timeout_s=20).run(body)


@pytest.mark.parametrize("plan", [Plan(cfg=2), Plan(step=2)], ids=str)
def test_noise_grids_that_differ_between_ranks_are_refused(plan):
    """They begin at one timestep; what lies between would be taken with two grids."""
    case = models.CASES["sd3-flow"]

    def body(mesh):
        pipe = case.pipeline()
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler.set_shift(3.0 if mesh.world_rank else 1.0)
        with parallelized(pipe, plan, mesh=mesh):
            case.call(pipe)

    with pytest.raises(RanksDisagree, match="timesteps"):
        LocalWorld(plan.sizes, timeout_s=20).run(body)


def test_plans_that_differ_between_ranks_are_named():
    plans = [Plan(step=Steps(degree=2, windows=Fixed(warmup=w))) for w in (1, 3)]

    def body(mesh):
        pipe = DDIM.pipeline()
        pipe.set_progress_bar_config(disable=True)
        with parallelized(pipe, plans[mesh.world_rank], mesh=mesh):
            DDIM.call(pipe)

    with pytest.raises(RanksDisagree, match=r"the plan: rank 0 has .*w1.* rank 1 .*w3"):
        LocalWorld(plans[0].sizes, timeout_s=20).run(body)


@pytest.mark.parametrize("debug", [True, False])
def test_debug_compares_latents_at_every_window(debug):
    """Other weights on one rank: equal inputs, and latents that part at the first step."""

    def body(mesh):
        pipe = Pipeline("flow_prediction")
        pipe.unet.centres_KD += mesh.world_rank / 100
        with parallelized(pipe, plan, mesh=mesh, debug=debug):
            return pipe(torch.ones(4, 12, dtype=torch.float64))

    plan = Plan(step=Steps(degree=2, exact_split=False))
    world = LocalWorld(plan.sizes, timeout_s=20)
    if debug:
        with pytest.raises(RanksDisagree, match=r"window-start latents: rank \d has"):
            world.run(body)
    else:
        assert not torch.equal(*world.run(body))


class StepsTwice(Pipeline):
    """Two steps of the scheduler on each prediction: another walk than the one that is planned."""

    def __call__(self, x):
        for t in self.scheduler.timesteps[::2]:
            guided = self.unet(x, t)[0]
            x = self.scheduler.step(guided, t, x)[0]
            x = self.scheduler.step(guided, t + 1, x)[0]
        return x


def test_a_step_without_a_denoiser_call_is_refused():
    pipe = StepsTwice("flow_prediction")
    refused = pytest.raises(UnsupportedPipeline, match="step 1: the scheduler stepped twice")
    with emulate(pipe, Plan(step=2), timeout_s=20), refused:
        pipe(torch.ones(4, 12, dtype=torch.float64))


@pytest.mark.parametrize("degree", [2, 3, 8])
def test_a_leader_walks_the_published_schedule(degree):
    """As ParaStep does: the first rank's latents alone are true, others reuse outputs of theirs."""
    pipe = Pipeline("epsilon")
    denoise, step, x, _ = problem(pipe)
    twin = naive.published(denoise, step, x, NUM_STEPS, degree, 5)
    with emulate(pipe, Plan(step=Steps(degree=degree, windows=Parastep(), walk="leader"))) as run:
        output = pipe(torch.from_numpy(x))
    assert run.report.walk == "leader"
    assert close(output, twin)


def test_a_leader_learns_what_replaying_ranks_learn():
    """Damping is fitted also on ranks that take no true step; predictions stay as they come."""
    pipe = Pipeline("epsilon")
    denoise, step, x, noise = problem(pipe)
    sizes = search.tail(noise, 4)
    twin = naive.replay(denoise, step, x, sizes, noise, naive.damped)
    steps = Steps(degree=4, windows=Listed(sizes=sizes), walk="leader", exact_split=False)
    with emulate(pipe, Plan(step=steps)):
        assert close(pipe(torch.from_numpy(x)), twin)


class EndsEarly:
    """Mixin: a pipeline that returns without a word where its loop was stopped."""

    def __call__(self, *args, **kwargs):
        try:
            return super().__call__(*args, **kwargs)
        except StopIteration:
            return None


def test_a_pipeline_that_ends_inside_a_window_is_an_error():
    """Its latents are guesses there, and those are never returned."""
    pipe = DDIM.pipeline()
    pipe.__class__ = type("Ending", (EndsEarly, type(pipe)), {})

    def enough(pipe, i, t, tensors):
        if i == 2:
            raise StopIteration
        return {}

    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)), exact_split=False))
    wrong = pytest.raises(IncompleteWindow, match="the pipeline ended at step 3, inside the window")
    with emulate(pipe, plan, timeout_s=20), wrong:
        DDIM.call(pipe, callback_on_step_end=enough)


def test_callbacks_are_told_what_is_provisional():
    """Latents are true after an exact step and at the end of a window, guesses between."""

    def body(mesh):
        pipe, seen = DDIM.pipeline(), []
        pipe.set_progress_bar_config(disable=True)

        def watch(pipe, i, t, tensors):
            seen.append(attached.provisional)
            return {}

        with parallelized(pipe, plan, mesh=mesh) as attached:
            DDIM.call(pipe, callback_on_step_end=watch)
            assert not attached.provisional
        return seen

    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 1, 2, 1)), exact_split=False))
    expected = [False, True, True, False, False, True, False, False]
    assert LocalWorld(plan.sizes, timeout_s=20).run(body) == [expected] * 3

    def watch(pipe, i, t, tensors):
        seen.append((i, run.provisional))
        return {}

    pipe, seen = DDIM.pipeline(), []
    with emulate(pipe, plan) as run:
        DDIM.call(pipe, callback_on_step_end=watch)
        assert not run.provisional
    # Virtual ranks take turns, so that their steps are mixed.
    assert sorted(seen) == sorted(list(enumerate(expected)) * 3)


def test_calls_that_feed_one_another_are_refused():
    case = models.CASES["wan-flow"]
    pipe = case.pipeline()
    pipe.transformer.__class__ = type("Chained", (type(pipe.transformer),), {})
    calls = []
    original = type(pipe.transformer).__call__

    def call(module, *args, **kwargs):
        if calls and len(calls) % 2:
            kwargs["hidden_states"] = kwargs["hidden_states"] + calls[-1][0] / 10
        calls.append(original(module, *args, **kwargs))
        return calls[-1]

    type(pipe.transformer).__call__ = call
    with emulate(pipe, Plan(cfg=2)), pytest.raises(SplitMismatch, match="depends on the output"):
        case.call(pipe)


def test_sharing_an_exact_step_is_verified():
    pipe = unknown(DDIM.pipeline())
    plain = pipe.unet.forward

    def mixed(*args, **kwargs):
        rows = plain(*args, **kwargs)[0]
        return (rows + rows.flip(0) / 2,)

    pipe.unet.forward = mixed
    plan = Plan(step=Steps(degree=2, windows=Listed(sizes=(1,) * 8)))
    with emulate(pipe, plan), pytest.raises(SplitMismatch, match="rows depend on one another"):
        DDIM.call(pipe)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(step=Steps(degree=2, windows=Listed(sizes=(1,) * 8)))], ids=str
)
def test_a_batch_that_is_not_cut_is_not_checked(plan):
    """One row, without guidance, is whole on every rank: nothing is evaluated besides."""
    pipe = unknown(DDIM.pipeline())
    with emulate(pipe, plan) as run, counted(pipe) as seen:
        DDIM.call(pipe, guidance_scale=1.0)
    assert sum(seen.values()) == sum(r.evaluations + r.structure_calls for r in run.reports)


def test_an_output_that_is_not_finite_is_named_as_that():
    """Compared with itself it differs, which says nothing of its rows."""
    pipe = unknown(DDIM.pipeline())
    pipe.unet.forward = lambda sample, *_, **options: (torch.full_like(sample, torch.nan),)
    with emulate(pipe, Plan(cfg=2)), pytest.raises(NonFinite, match="step 0 holds NaN"):
        DDIM.call(pipe)


def test_the_published_schedule_shares_no_exact_step():
    """Every rank computes the warm-up whole, and sends nothing: that is the baseline's cost."""
    pipe = DDIM.pipeline()
    plan = Plan(step=Steps(degree=2, windows=Parastep(warmup=4)))
    with emulate(pipe, plan) as run:
        whole = DDIM.call(pipe)
        assert torch.equal(DDIM.call(pipe), whole)
    assert [r.evaluations for r in run.reports] == [6, 6]
    assert {lane.phase for r in run.reports for lane, _ in r.traffic} == {"window", "report"}


@pytest.mark.parametrize("name", ["wan22-two-transformers", "sd3-skip-layer"])
def test_calls_that_learn_a_form_are_counted_apart(name):
    """A second network, or a further call, may first come up where another rank evaluates."""
    case = models.CASES[name]
    pipe, found, passes = case.pipeline(), [], []
    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=(1, 3, 3, 1)), exact_split=False))
    with emulate(pipe, plan) as run:
        for _ in range(2):
            with counted(pipe) as seen:
                case.call(pipe)
            found.append([(r.evaluations, r.structure_calls) for r in run.reports])
            passes.append(sum(seen.values()))
    first, second = found
    assert [planned for planned, _ in first] == [planned for planned, _ in second]
    assert sum(learned for _, learned in first) > 0
    assert not any(learned for _, learned in second)
    assert passes == [sum(map(sum, call)) for call in found]


@pytest.mark.parametrize("plan", [Plan(cfg=2), Plan(step=2), Plan(step=2, cfg=2)], ids=str)
def test_a_batch_held_against_the_whole_is_a_call_besides(plan):
    pipe, seen = unknown(DDIM.pipeline()), []
    with emulate(pipe, plan) as run:
        for _ in range(2):
            with counted(pipe) as passes:
                DDIM.call(pipe)
            seen.append([r.structure_calls for r in run.reports])
            assert sum(passes.values()) == sum(
                r.evaluations + r.structure_calls for r in run.reports
            )
    assert seen == [[1] * plan.world_size, [0] * plan.world_size]


def test_the_length_of_an_earlier_call_is_forgotten():
    """A pipeline that keeps one may not set it anew in every call."""
    pipe = Pipeline("flow_prediction")
    pipe._num_timesteps = NUM_STEPS // 2
    with emulate(pipe, Plan(step=2)) as run:
        pipe(torch.ones(4, 12, dtype=torch.float64))
    assert run.report.depth == search.default_depth(NUM_STEPS, 2)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_leader_looks_at_every_prediction(poisoned):
    """Its own and those it is sent: nobody else takes the true steps."""

    def body(mesh):
        pipe = Pipeline("flow_prediction")
        plain, rank = pipe.unet.forward, mesh.world_rank
        if rank == poisoned:
            pipe.unet.forward = lambda x, i: (plain(x, i)[0] / (0 if i == 7 + rank else 1),)
        with parallelized(pipe, plan, mesh=mesh):
            pipe(torch.ones(4, 12, dtype=torch.float64))

    # Exact steps 0 to 6, then windows that begin at the odd ones.
    steps = Steps(degree=2, windows=Fixed(warmup=7), walk="leader", exact_split=False)
    plan = Plan(step=steps)
    with pytest.raises(NonFinite, match=f"the prediction of step {7 + poisoned} holds NaN"):
        LocalWorld(plan.sizes, timeout_s=20).run(body)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("wan22-two-transformers", (1, 3, 3, 1)),
        ("wan22-two-transformers", (1, 2, 3, 2)),
        ("sd3-skip-layer", (1, 3, 3, 1)),
    ],
)
def test_unlike_calls_do_not_share_a_batch(name, sizes):
    case = models.CASES[name]
    pipe = case.pipeline()
    plan = Plan(step=Steps(degree=3, windows=Listed(sizes=sizes), exact_split=False))
    run = emulate(pipe, plan, batched=True, timeout_s=20)
    with run, pytest.raises(UnsupportedPipeline, match="unlike denoiser calls"):
        case.call(pipe)


def test_a_pipeline_may_write_into_what_it_got():
    case = models.CASES["flux-distilled"]
    outputs = []
    for in_place in (False, True):
        pipe = case.pipeline()

        class Writing(type(pipe.transformer)):
            def __call__(self, *args, in_place=in_place, **kwargs):
                (output,) = super().__call__(*args, **kwargs)
                return (output.mul_(1.001) if in_place else output * 1.001,)

        pipe.transformer.__class__ = Writing
        with emulate(pipe, Plan(step=Steps(degree=3, exact_split=False))):
            outputs.append(case.call(pipe))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("walk", ["auto", "leader"])
def test_adaptive_windows_need_the_replay_walk(walk):
    case = models.CASES["sd15-inpaint"]
    pipe = case.pipeline()
    plan = Plan(step=Steps(degree=3, windows=Adaptive(), walk=walk))
    with emulate(pipe, plan), pytest.raises(PlanMismatch, match="only the replay walk"):
        case.call(pipe)


def test_virtual_ranks_inherit_autocast():
    pipe = DDIM.pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        plain = DDIM.call(pipe)
        with emulate(pipe, Plan()):
            assert torch.equal(DDIM.call(pipe), plain)


def test_virtual_ranks_inherit_the_stream_of_their_device(monkeypatch):
    """Stand-ins are there for a GPU's streams."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream on", device.index))
    monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext(entered.append(given)))
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with _modes(device)():
            pass
    assert entered == [("stream on", 1), None]


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [False, True])
def test_virtual_ranks_work_on_the_callers_stream(offloaded):
    pipe, seen, stream = DDIM.pipeline(), [], torch.cuda.Stream()
    pipe.enable_model_cpu_offload() if offloaded else pipe.to("cuda")
    pipe.unet.register_forward_hook(lambda *_: seen.append(torch.cuda.current_stream()))
    with torch.cuda.stream(stream), emulate(pipe, Plan()):
        DDIM.call(pipe)
    assert set(seen) == {stream}


def test_virtual_ranks_inherit_inference_mode():
    pipe, seen = DDIM.pipeline(), []
    pipe.unet.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    with emulate(pipe, Plan()):
        DDIM.call(pipe)
        with torch.inference_mode():
            DDIM.call(pipe)
    assert seen == [False] * DDIM.steps + [True] * DDIM.steps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_virtual_ranks_inherit_whether_gradients_are_kept(mode):
    """Threads begin with gradients, and a pipeline of one's own may not turn them off."""
    pipe, seen = Pipeline("flow_prediction"), []
    plain = pipe.unet.forward
    pipe.unet.forward = lambda x, i: seen.append(torch.is_grad_enabled()) or plain(x, i)
    with mode(), emulate(pipe, Plan()):
        pipe(torch.ones(4, 12, dtype=torch.float64))
    assert seen == [mode is torch.enable_grad] * NUM_STEPS


def test_one_generator_given_twice_stays_one():
    case = models.CASES["sd15-euler-ancestral"]
    pipe = case.pipeline()
    inputs = {
        key: value.repeat(2, 1, 1) for key, value in case.inputs().items() if key.endswith("embeds")
    }

    def call():
        generator = torch.Generator().manual_seed(4)
        return case.call(pipe, **inputs, generator=[generator, generator])

    plain = call()
    with emulate(
        pipe, Plan(step=Steps(degree=2, windows=Listed(sizes=(1,) * 8), exact_split=False))
    ):
        assert torch.equal(call(), plain)


def test_a_shared_module_is_refused_at_once():
    one, two = DDIM.pipeline(), DDIM.pipeline()
    two.unet = one.unet
    with parallelized(one, Plan(), mesh=alone()):
        second = parallelized(two, Plan(), mesh=alone())
        with pytest.raises(UnsupportedPipeline, match="already belongs to a parallelized"):
            second.__enter__()
        DDIM.call(one)


def test_leaving_keeps_what_others_wrapped_since():
    pipe = DDIM.pipeline()
    plain = DDIM.call(pipe)
    with parallelized(pipe, Plan(), mesh=alone()):
        ours = pipe.unet.forward

        def theirs(*args, **kwargs):
            return ours(*args, **kwargs)

        pipe.unet.forward = theirs
    assert pipe.unet.forward is theirs
    assert torch.equal(DDIM.call(pipe), plain)


def test_a_cache_enabled_inside_is_refused():
    from diffusers import FirstBlockCacheConfig

    case = models.CASES["flux-distilled"]

    def body(mesh):
        pipe = case.pipeline()
        with parallelized(pipe, Plan(step=2), mesh=mesh) if mesh else emulate(pipe, Plan(step=2)):
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
            with pytest.raises(UnsupportedPipeline, match="step cache"):
                case.call(pipe)

    body(None)
    LocalWorld({"step": 2}, timeout_s=20).run(body)


def test_tables_as_long_as_the_batch_stay_whole():
    """Positions and rotations hold no batch, also where their length is that of the batch."""
    rows, table = torch.arange(8.0).view(4, 2, 1), torch.arange(4.0)
    named = {"txt_ids": table, "guidance": table, "own_table": table}
    call = Denoise("transformer", dict, (rows,), named, never_split=NEVER_SPLIT | {"own_table"})
    part = call.chunk(1, 2)
    assert part.args[0].flatten().tolist() == [4, 5, 6, 7]
    assert part.kwargs["guidance"].tolist() == [2, 3]
    assert part.kwargs["txt_ids"] is part.kwargs["own_table"] is table


def test_remembered_outputs_stay_few():
    pipe = DDIM.pipeline()
    embeds = DDIM.inputs()
    with parallelized(pipe, Plan(), mesh=alone()) as attached:
        for tokens in range(1, 14):
            changed = {k: v[:, :tokens] for k, v in embeds.items() if k.endswith("embeds")}
            DDIM.call(pipe, **changed, num_inference_steps=2)
    assert len(attached._remembered._outputs) <= 9


class TwoSchedulers:
    """Mixin: a call that deep-copies its scheduler and steps the copy too."""

    def step_copy(self):
        other = copy.deepcopy(self.scheduler)
        other.set_timesteps(4)
        ones = torch.ones(1, 4, 2, 2)
        return other.step(ones, other.timesteps[0], ones)[0]


@pytest.mark.parametrize("degree", [1, 2])
def test_a_copied_scheduler_steps_for_itself_or_is_refused(degree):
    pipe = DDIM.pipeline()
    pipe.__class__ = type("Copying", (TwoSchedulers, type(pipe)), {})
    alone_result = pipe.step_copy()
    seen = []

    def copying(pipe, i, t, tensors):
        seen.append(pipe.step_copy())
        return {}

    plan = Plan(step=Steps(degree=degree, exact_split=False))
    with emulate(pipe, plan):
        if degree == 1:
            DDIM.call(pipe, callback_on_step_end=copying)
            assert all(torch.equal(result, alone_result) for result in seen)
        else:
            with pytest.raises(UnsupportedPipeline, match="second scheduler"):
                DDIM.call(pipe, callback_on_step_end=copying)


def test_a_pipeline_called_by_its_own_callback_is_refused():
    pipe = DDIM.pipeline()
    plain = DDIM.call(pipe)

    def again(pipe, i, t, tensors):
        DDIM.call(pipe)
        return {}

    with parallelized(pipe, Plan(), mesh=alone()):
        with pytest.raises(UnsupportedPipeline, match="called inside its own call"):
            DDIM.call(pipe, callback_on_step_end=again)
        assert torch.equal(DDIM.call(pipe), plain)


def test_an_emulated_pipeline_called_by_two_threads_is_refused():
    """Ranks of one call would wait for what those of the other have come to know."""
    pipe, said = DDIM.pipeline(), []

    def call():
        with pytest.raises(UnsupportedPipeline) as caught:
            DDIM.call(pipe)
        said.append(str(caught.value))

    def beside(virtual, i, t, tensors):
        if not said:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        return {}

    with emulate(pipe, Plan(step=2)):
        DDIM.call(pipe, callback_on_step_end=beside)
        assert "by a callback or another thread" in said[0]
        DDIM.call(pipe)


def copied_plainly(pipe, plain, attached):
    """A deep copy made under a plan gives `plain`'s bits from modules of its own, untouched."""
    other = copy.deepcopy(pipe)
    assert type(other) is plain
    assert "forward" not in vars(other.unet)
    assert not {"step", "set_timesteps"} & set(vars(other.scheduler))
    before = attached.report
    with counted(other) as seen:
        result = DDIM.call(other)
    assert seen
    assert attached.report is before
    return result


@pytest.mark.parametrize("way", [emulate, partial(parallelized, mesh=alone())])
def test_a_shallow_copy_made_under_a_plan_is_a_plain_one(way):
    pipe = DDIM.pipeline()
    plain, kind = DDIM.call(pipe), type(pipe)
    with way(pipe, Plan()) as attached:
        other = copy.copy(pipe)
        assert type(other) is kind
        assert other.unet is pipe.unet
        assert torch.equal(DDIM.call(other), plain)
        assert attached.report is None


@pytest.mark.parametrize("way", [emulate, partial(parallelized, mesh=alone())])
def test_no_pickle_takes_a_pipeline_under_a_plan(way):
    pipe = DDIM.pipeline()
    with way(pipe, Plan()), pytest.raises(UnsupportedPipeline, match="leave the block first"):
        pickle.dumps(pipe)
    assert isinstance(pickle.loads(pickle.dumps(pipe)), type(pipe))


@pytest.mark.parametrize("way", [emulate, partial(parallelized, mesh=alone())])
def test_a_pipeline_copied_under_a_plan_is_a_plain_one(way):
    pipe = DDIM.pipeline()
    plain, kind = DDIM.call(pipe), type(pipe)
    with way(pipe, Plan()) as attached:
        assert torch.equal(copied_plainly(pipe, kind, attached), plain)
        assert torch.equal(DDIM.call(pipe), plain)
        assert attached.report is not None
    assert type(pipe) is kind
    assert "forward" not in vars(pipe.unet)


def test_a_pipeline_copied_by_its_own_callback_is_refused():
    pipe = DDIM.pipeline()

    def copying(pipe, i, t, tensors):
        copy.deepcopy(pipe)
        return {}

    with (
        parallelized(pipe, Plan(), mesh=alone()),
        pytest.raises(UnsupportedPipeline, match="deep-copied inside its own call"),
    ):
        DDIM.call(pipe, callback_on_step_end=copying)
