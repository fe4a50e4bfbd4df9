"""Estimates: seconds by hand, bytes that are the plan's own, and what must be monotone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto import estimate
from stretto.cluster.model import Cluster
from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.model import Plan
from stretto.plan.options import Fixed, Guidance, GuidanceCase, Listed, Parastep, Steps, StepsCase
from stretto.search.resolve import resolve
from stretto.search.windows import calls
from stretto.workload import denoise
from stretto.workload.model import Workload
from tests.cluster.make import cluster, device, line, link, node


def job(steps=8, **fields):
    given_here = {"evaluation_seconds": 1.0, "guided_bytes": 10**6, **fields}
    return Workload.denoise(steps, **given_here)


def listed(*sizes, degree=None, **options):
    return Steps(degree=degree or max(sizes), windows=Listed(sizes=sizes), **options)


@st.composite
def cases(draw):
    """A workload, a plan that fits it, and its ranks."""
    steps = draw(st.integers(2, 16))
    degree = draw(st.integers(1, min(4, steps)))
    guidance = draw(st.sampled_from(["batch", "calls", "none"]))
    cfg = draw(st.integers(1, 1 if guidance == "none" else 2))
    workload = job(
        steps,
        guidance=guidance,
        evaluation_seconds=draw(st.floats(1e-3, 10)),
        half_batch_cost=draw(st.floats(0.3, 1)),
        guided_bytes=draw(st.integers(0, 10**8)) * 2,
        step_seconds=draw(st.floats(0, 0.1)),
        rows=draw(st.sampled_from([None, 2, 4, 8])),
    )
    windows = draw(st.sampled_from([Fixed(), Parastep(), None]))
    option = {} if windows is None else {"windows": windows}
    split = draw(st.booleans())
    plan = Plan(step=Steps(degree=degree, exact_split=split, **option), cfg=cfg)
    return workload, plan


def test_seconds_by_hand_without_guidance():
    """1 exact step, 3 windows of 2, 1 exact: 5 evaluations, 3 gathers of 1 MB + header."""
    workload = job(guidance="none", encode_seconds=2, decode_seconds=3, step_seconds=0.1)
    found = estimate(workload, line(2), Plan(step=listed(1, 2, 2, 2, 1)))
    assert found.phases["evaluate"] == pytest.approx(5)
    gather, report = (10**6 + 256) / 1e9 + 1e-5, 8 * 8 / 1e9 + 1e-5
    assert found.phases["exchange"] == pytest.approx(3 * gather + report)
    assert found.phases["replay"] == pytest.approx(0.1 * (1 + 3 * 3 + 1))
    assert found.seconds == pytest.approx(10 + 1.1 + 3 * gather + report)
    assert found.sequential_seconds == pytest.approx(8 + 0.8 + 5)
    assert (found.depth, found.ceiling) == (pytest.approx(5), pytest.approx(8 / 5))
    assert found.bottleneck == "evaluate"
    assert found.basis == "projected"


def test_a_short_window_is_a_broadcast_from_each_owner():
    workload = job(5, guidance="none")
    found = estimate(workload, line(4), Plan(step=listed(1, 3, 1, degree=4)))
    tree = 2 * ((10**6 + 256) / 1e9 + 1e-5)
    report = 3 * (5 * 8 / 1e9 + 1e-5)
    assert found.phases["exchange"] == pytest.approx(3 * tree + report)


def test_guidance_in_batches_halves_the_evaluation():
    found = estimate(job(half_batch_cost=0.6), line(2), Plan(cfg=2))
    assert found.phases["evaluate"] == pytest.approx(8 * 0.6)
    assert found.phases["exchange"] == pytest.approx(8 * (10**6 / 1e9 + 1e-5))


def test_guidance_in_calls_moves_one_output_and_one_result():
    found = estimate(job(guidance="calls", half_batch_cost=0.9), line(2), Plan(cfg=2))
    assert found.phases["evaluate"] == pytest.approx(4)
    assert found.phases["exchange"] == pytest.approx(8 * 2 * (10**6 / 1e9 + 1e-5))


def test_an_exact_step_is_shared_by_step_ranks():
    shared = estimate(job(), line(2), Plan(step=listed(1, 2, 2, 2, 1)))
    whole = estimate(job(), line(2), Plan(step=listed(1, 2, 2, 2, 1, exact_split=False)))
    assert shared.phases["evaluate"] == pytest.approx(4)
    assert whole.phases["evaluate"] == pytest.approx(5)


def test_published_half_calls():
    """Ceilings of design: 17 half calls of 50 steps, 51 of 200 (cfg 2 x step 4)."""
    for steps, depth, ceiling in ((50, 17, 5.88), (200, 51, 7.84)):
        plan = Plan(step=Steps(degree=4), cfg=2)
        plan = Plan(step={"degree": 4, "windows": {"kind": "tail", "depth": depth}}, cfg=2)
        assert estimate(job(steps), line(8), plan).ceiling == pytest.approx(ceiling, abs=0.005)


def test_a_window_waits_for_its_slowest_device():
    mixed = cluster(
        {"fast": device(fp32="4 TFLOP/s"), "slow": device(fp32="1 TFLOP/s")},
        [node("a", "fast", 1), node("b", "slow", 1)],
        [link(between=("a", "b"))],
    )
    workload = Workload.denoise(
        4, guidance="none", evaluation_flops="2 TFLOP", dtype="fp32", efficiency=0.5
    )
    plan = Plan(step=listed(1, 2, 1))
    found = estimate(workload, mixed, plan)
    assert found.phases["evaluate"] == pytest.approx(3 * 4)
    assert found.sequential_seconds == pytest.approx(4 * 1)
    timed = job(4, guidance="none", device="fast", dtype="fp32")
    assert estimate(timed, mixed, plan).phases["evaluate"] == pytest.approx(3 * 4)


def test_the_published_schedule_shares_no_exact_step():
    """Its ceiling is the paper's: 50 steps, 5 of them exact, on 2 ranks take 28 evaluations."""
    plan = Plan(step=Steps(degree=2, windows=Parastep(warmup=5)))
    found = estimate(job(50), line(2), plan)
    assert found.ceiling == pytest.approx(50 / 28)
    assert not any(traffic.total(phase="exact") for traffic in found.traffic)


@given(cases())
def test_bytes_are_the_plans_own(case):
    workload, plan = case
    found = estimate(workload, line(8), plan)
    sizes = resolve(plan.step, denoise.noise_of(workload))
    rows, raw = denoise.rows_of(workload), denoise.raw_bytes_of(workload)
    batched = rows % plan.cfg.degree == 0
    part = plan.cfg.degree if batched else 1
    chunks = 1
    if batched and plan.step.exact_split and plan.step.guesses != "own":
        chunks = denoise.chunks_of(rows // part, plan.step.degree)
    for rank, traffic in enumerate(found.traffic):
        step, cfg = divmod(rank, plan.cfg.degree)
        steps = StepsCase(sizes, step, workload.guided_bytes, raw // part, chunks)
        branch = GuidanceCase(
            calls(sizes, step),
            denoise.calls_per_step(workload),
            cfg,
            raw,
            workload.guided_bytes,
            "batch" if batched else "calls",
        )
        assert traffic == plan.step.wire(steps) + plan.cfg.wire(branch)
    assert sum(found.link_bytes.values()) == sum(t.total() for t in found.traffic)


@given(cases(), st.floats(1e6, 1e12), st.floats(1, 1e3), st.floats(0, 1e-2))
def test_more_bandwidth_is_never_slower(case, rate, gain, latency):
    workload, plan = case
    slow = estimate(workload, line(8, rate, latency), plan)
    fast = estimate(workload, line(8, rate * gain, latency), plan)
    assert fast.seconds <= slow.seconds * (1 + 1e-12)
    assert fast.traffic == slow.traffic


@given(cases(), st.floats(1e6, 1e11), st.floats(1e6, 1e11), st.floats(1, 1e3), st.floats(0, 1e-2))
def test_one_better_link_of_several_is_never_slower(case, within, between, gain, latency):
    workload, plan = case

    def two(rate):
        return cluster(
            nodes=[node("a", "d", 4), node("b", "d", 4)],
            links=[
                link(within="a", rate=within, latency=latency),
                link(within="b", rate=within),
                link(between=("a", "b"), rate=rate),
            ],
        )

    slow, fast = (estimate(workload, two(rate), plan) for rate in (between, between * gain))
    assert fast.seconds <= slow.seconds * (1 + 1e-12)


@given(cases(), st.floats(1, 100))
def test_a_slower_model_is_never_faster(case, factor):
    workload, plan = case
    slower = workload.evaluation.model_copy(
        update={"seconds": workload.evaluation.seconds * factor}
    )
    fast = estimate(workload, line(8), plan)
    slow = estimate(workload.model_copy(update={"evaluation": slower}), line(8), plan)
    assert slow.seconds >= fast.seconds * (1 - 1e-12)
    assert slow.depth == pytest.approx(fast.depth)


@given(cases())
def test_the_interval_holds_the_estimate(case):
    found = estimate(*case[:1], line(8), case[1])
    low, high = found.interval
    assert low <= found.seconds <= high
    assert found.speedup <= found.ceiling * (1 + 1e-9) or found.phases["decode"] > 0


def test_one_rank_sends_nothing_and_takes_the_sequential_time():
    found = estimate(job(step_seconds=0.25, decode_seconds=1), line(1), Plan())
    assert found.seconds == found.sequential_seconds == 11
    assert found.link_bytes == {}
    assert found.speedup == found.ceiling == 1


def test_memory_counts_the_gathered_window():
    workload = job(guidance="none", memory_bytes="1 GiB", guided_bytes="16 MB")
    found = estimate(workload, line(4), Plan(step=4))
    assert found.memory_bytes == 2**30 + 4 * 16_000_000
    assert not found.fits
    assert estimate(job(), line(4), Plan(step=4)).memory_bytes is None


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(step=4), "for 2 device"),
        (Plan(cfg=Guidance(degree=2, split="batch")), "does not divide the denoiser's batch of 1"),
        (Plan(cfg=2), "batch of 1 nor its 1 call"),
        (Plan(step=listed(1, 2)), "windows cover 3 steps"),
        (Plan(step={"degree": 2, "windows": {"kind": "adaptive"}}), "not known before the run"),
    ],
)
def test_what_does_not_fit_is_refused(plan, match):
    with pytest.raises(PlanMismatch, match=match):
        estimate(job(guidance="none"), line(2), plan)


def test_an_unknown_dtype_is_refused():
    workload = Workload.denoise(4, evaluation_flops="1 TFLOP", dtype="fp8")
    with pytest.raises(ConfigError, match="no fp8 rate"):
        estimate(workload, line(2), Plan())


def test_files_stand_for_nouns(tmp_path):
    workload, plan = tmp_path / "w.yaml", tmp_path / "p.yaml"
    job(20).write(workload)
    plan.write_text("stretto: plan/1\nkind: generate\nstep: {degree: 4}\n")
    assert estimate(workload, "h100-x8", plan) == estimate(
        job(20), Cluster.read("h100-x8"), Plan(step=4)
    )
