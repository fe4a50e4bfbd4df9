"""find_plans: what is compared, in which order, and what is left out and why."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto import find_plans
from stretto.errors import ConfigError
from stretto.plan.model import Plan
from stretto.search.resolve import guess_error, resolve
from stretto.search.space import TIE, candidates
from stretto.workload.denoise import flow_noise
from stretto.workload.model import Workload
from tests.cluster.make import cluster, device, line, link, node


def job(steps=50, **fields):
    given_here = {"evaluation_seconds": 1.0, "guided_bytes": 10**6, "shift": 3.0}
    return Workload.denoise(steps, **{**given_here, **fields})


def degrees(choice):
    return choice.plan.step.degree, choice.plan.cfg.degree


def test_exact_unless_asked():
    found = find_plans(job(), line(8))
    assert [degrees(c) for c in found.choices] == [(1, 2), (1, 1)]
    assert all(c.guess_error == 0 for c in found.choices)


def test_guidance_that_gains_nothing_is_not_first():
    """Half a batch that takes as long as all of it: launches bind, and cfg only adds bytes."""
    found = find_plans(job(half_batch_cost=1.0), line(2))
    assert [degrees(c) for c in found.choices] == [(1, 1), (1, 2)]
    assert found.choices[1].loses
    assert "loses to one device" in str(found)


def test_half_batch_cost_decides_between_cfg_and_step():
    """Measured on a slice of a GPU: 0.42 s whole and 0.23 s half, 200 steps, 8 ranks."""
    audio = job(200, evaluation_seconds=0.42, half_batch_cost=0.23 / 0.42)
    assert degrees(find_plans(audio, line(8), "approximate").choices[0]) == (8, 1)
    for half, first in ((0.23 / 0.42, (8, 1)), (0.5, (4, 2))):
        found = find_plans(job(50, half_batch_cost=half), line(8), "approximate")
        assert degrees(found.choices[0]) == first


def test_limits_on_depth_hold():
    limited = job(limits={"least_depth": 17})
    found = find_plans(limited, line(8), "approximate")
    assert min(len(c.estimate.windows) for c in found.choices) == 17
    assert degrees(found.choices[0]) == (4, 2)


def test_a_slow_link_leaves_one_device_first():
    found = find_plans(job(evaluation_seconds=0.001), line(8, rate=1e5), "approximate")
    assert found.best.world_size == 1
    assert all(c.loses for c in found.choices[1:])


def test_what_does_not_fit_is_left_out_with_the_shortage():
    workload = job(memory_bytes="0.8 GiB", guided_bytes="20 MB")
    found = find_plans(workload, line(8), "approximate")
    assert {c.plan.step.degree for c in found.choices} == {1, 2, 4}
    assert {plan.step.degree for plan, _ in found.dropped} == {8}
    assert all("0.92 GiB are allowed" in why for _, why in found.dropped)
    with pytest.raises(ConfigError, match="no plan fits test: needs 2"):
        find_plans(job(memory_bytes="2 GiB"), line(2))


def test_the_best_plan_says_where_it_came_from():
    best = find_plans(job(), line(2)).best
    assert best.origin.basis == "projected"
    assert best.origin.by == "find_plans exact"


def test_ties_are_shown_and_go_to_fewer_ranks():
    found = find_plans(job(guidance="none", half_batch_cost=1.0), line(1), "approximate")
    assert "(tie)" not in str(found)
    free = job(evaluation_seconds=1.0, half_batch_cost=1.0, guided_bytes=0)
    tied = find_plans(free, line(2, latency=0.0))
    assert [degrees(c) for c in tied.choices] == [(1, 1), (1, 2)]
    assert "(tie)" in str(tied)


def test_an_exact_plan_does_not_lose_by_a_latency():
    """Two ranks: step 2 at any depth and cfg 2 take the same evaluations, only one is exact."""
    found = find_plans(job(28), line(2), "approximate")
    assert degrees(found.choices[0]) == (1, 2)
    assert min(found.choices, key=lambda c: c.estimate.seconds).guess_error > 0


def test_an_unknown_fidelity_is_refused():
    with pytest.raises(ConfigError, match="'lossy' is unknown"):
        find_plans(job(), line(2), "lossy")


def test_odd_ranks_take_step_alone():
    plans = [(p.step.degree, p.cfg.degree) for p in candidates(job(), 3, "approximate")]
    assert set(plans) == {(1, 1), (1, 2), (3, 1)}


def test_two_nodes_prefer_guidance_inside_them():
    """The mesh puts cfg on neighbours, so only the step axis crosses the slow link."""
    two = cluster(
        {"d": device()},
        [node("a", "d", 2), node("b", "d", 2)],
        [link(within="a"), link(within="b"), link(between=("a", "b"), rate="10 MB/s")],
    )
    best = find_plans(job(), two, "approximate").choices[0].estimate
    assert best.link_bytes["within a"] > 0
    assert degrees(find_plans(job(), two, "approximate").choices[0]) == (2, 2)


@settings(max_examples=40)
@given(
    steps=st.integers(1, 24),
    ranks=st.integers(1, 9),
    guidance=st.sampled_from(["none", "batch", "calls"]),
    half=st.floats(0.4, 1),
    seconds=st.floats(1e-4, 10),
)
def test_rankings_are_ordered_complete_and_never_lose_to_sequential(
    steps, ranks, guidance, half, seconds
):
    workload = job(steps, guidance=guidance, half_batch_cost=half, evaluation_seconds=seconds)
    found = find_plans(workload, line(ranks), "approximate")
    times = [c.estimate.seconds for c in found.choices]
    assert all(a <= b * (1 + TIE) for a, b in pairwise(times))
    assert times[0] <= found.choices[0].estimate.sequential_seconds * (1 + TIE)
    assert Plan() in [c.plan for c in found.choices]
    assert len(found.choices) + len(found.dropped) == len(
        list(candidates(workload, ranks, "approximate"))
    )
    exact = find_plans(workload, line(ranks)).choices
    assert {c.plan for c in exact} <= {c.plan for c in found.choices}


def test_guess_error_is_zero_only_for_exact_steps():
    noise = flow_noise(8, 3.0)
    assert guess_error((1,) * 8, noise) == 0
    assert guess_error((1, 2, 2, 2, 1), noise) > 0


def test_every_option_resolves_to_sizes_that_sum_up():
    noise = flow_noise(20, 3.0)
    for windows in ("parastep", "tail", "fixed"):
        steps = Plan(step={"degree": 4, "windows": {"kind": windows}}).step
        assert sum(resolve(steps, noise)) == 20
    assert resolve(Plan().step, noise) == (1,) * 20
