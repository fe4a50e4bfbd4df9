from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.errors import PlanMismatch
from stretto.search import windows as search


def flow_noise(num_steps, shift):
    """The grid of flow matching Euler: evenly spaced times, shifted."""
    times = [1 - step / num_steps for step in range(num_steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in times] + [0.0]


def karras_noise(num_steps, least=0.002, most=80.0, rho=7):
    """Karras et al. 2022, equation 5, as noise fractions."""
    low, high = least ** (1 / rho), most ** (1 / rho)
    steps = [step / (num_steps - 1) for step in range(num_steps)]
    sigmas = [(high + x * (low - high)) ** rho for x in steps]
    return [sigma / (1 + sigma) for sigma in sigmas] + [0.0]


def all_plans(num_steps, degree):
    """Every window plan, by recursion: the first window is 1, the others 1..degree."""

    def rest(left):
        if left == 0:
            yield ()
        for size in range(1, min(degree, left) + 1):
            for after in rest(left - size):
                yield (size, *after)

    return [(1, *after) for after in rest(num_steps - 1)]


def summed(windows, cost):
    """Summed cost, last window first as the dynamic programme does: the same rounding."""
    starts = [sum(windows[:index]) for index in range(len(windows))]
    total = 0.0
    for start, size in reversed(list(zip(starts, windows, strict=True))):
        total = (cost(start, size) if start else 0.0) + total
    return total


def brute_force(num_steps, degree, depth, cost, window_cost=None):
    """Least cost within the depth; of equal plans the one with larger earlier windows."""
    fits = [
        plan for plan in all_plans(num_steps, degree) if search.depth(plan, window_cost) <= depth
    ]
    least = min(summed(plan, cost) for plan in fits)
    return max(plan for plan in fits if summed(plan, cost) == least)


@st.composite
def small_cases(draw):
    num_steps = draw(st.integers(1, 10))
    degree = draw(st.integers(1, min(4, num_steps)))
    depth = draw(st.integers(search.least_depth(num_steps, degree), num_steps))
    costs = draw(st.lists(st.integers(0, 5), min_size=44, max_size=44))
    return num_steps, degree, depth, lambda start, size: float(costs[start * 4 + size - 1])


@st.composite
def noise_grids(draw, most=10):
    values = draw(st.lists(st.floats(0, 1), min_size=1, max_size=most, unique=True))
    return [*sorted(values, reverse=True), 0.0]


@pytest.mark.parametrize(
    ("num_steps", "warmup", "depths"),
    [(50, 5, (28, 17, 11)), (50, 13, (32, 23, 18)), (200, 5, (103, 54, 30))],
)
def test_published_depths_are_those_of_the_table(num_steps, warmup, depths):
    plans = [search.published(num_steps, degree, warmup) for degree in (2, 4, 8)]
    assert tuple(map(len, plans)) == depths
    assert all(sum(plan) == num_steps for plan in plans)


def test_published_puts_the_remainder_last():
    assert search.published(12, 4, 2) == (1, 1, 4, 4, 2)
    assert search.published(10, 4, 2) == (1, 1, 4, 4)
    assert search.published(5, 4, 5) == (1,) * 5


def test_fixed_ends_with_exact_steps():
    assert search.fixed(14, 4, 2, 3) == (1, 1, 4, 4, 1, 1, 1, 1)
    assert search.fixed(13, 4, 1, 2) == (1, 4, 4, 2, 1, 1)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (1, -1), (5, 4), (9, 0)])
def test_fixed_refuses_ends_that_do_not_fit(warmup, cooldown):
    with pytest.raises(PlanMismatch, match=f"warmup {warmup} .* cooldown {cooldown} .* 8 steps"):
        search.fixed(8, 2, warmup, cooldown)


def test_default_depth_is_that_of_the_published_schedule():
    assert [search.default_depth(50, degree) for degree in (1, 2, 4, 8)] == [50, 28, 17, 11]
    assert [search.default_depth(28, degree) for degree in (2, 4, 8)] == [17, 11, 8]
    assert search.default_depth(8, 4) == 4  # two exact steps
    assert search.default_depth(2, 2) == 2
    assert search.default_depth(1, 1) == 1


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (flow_noise(50, 3), "1 3 5 7 7 7 6 5 4 3 2"),
        (karras_noise(50), "1 8 7 5 4 3 3 3 3 5 8"),
    ],
    ids=["shift-3", "karras"],
)
def test_tail_gives_the_documented_plans(noise, expected):
    assert " ".join(map(str, search.tail(noise, 8, 11))) == expected
    assert search.tail(noise, 8) == search.tail(noise, 8, 11)


def test_tail_cost_by_hand():
    noise = [1.0, 0.9, 0.5, 0.3, 0.0]
    # Step * reach * (reach / 2 + the known step 0.1) / noise / signal^2, for two guessed positions.
    first = 0.2 * 0.4 * (0.2 + 0.1) / 0.5 / 0.5**2
    second = 0.3 * 0.6 * (0.3 + 0.1) / 0.3 / 0.7**2
    assert search.tail_cost(noise, 1, 1) == 0
    assert search.tail_cost(noise, 1, 2) == pytest.approx(first**2, rel=1e-12)
    assert search.tail_cost(noise, 1, 3) == pytest.approx((first + second) ** 2, rel=1e-12)


def test_windows_within_the_history_are_trusted():
    assert [search.distrust(8, size) for size in (1, 7, 8)] == [1.0, 1.0, 1.0]
    assert search.distrust(4, 8) == 2.0**8


def test_tail_cost_stays_finite_at_both_ends():
    assert search.tail_cost([1.0, 0.5, 0.0, 0.0], 1, 2) == 0.0
    assert search.tail_cost([1.0, 0.5, 0.0, 0.25], 1, 2) == pytest.approx((125 * 0.75) ** 2)
    # All noise: nothing of the picture is there, and one part in a thousand is counted.
    assert search.tail_cost([0.75, 0.5, 1.0, 0.5], 1, 2) == pytest.approx((125_000 * 1.0) ** 2)


def test_windows_shrink_at_both_ends():
    """Where little signal or little noise is left, windows are smaller than between."""
    for shift in (1, 3):
        sizes = search.tail(flow_noise(50, shift), 8)
        first, last, most = sizes[1], sizes[-1], max(sizes)
        assert first < most
        assert last < most


@given(small_cases())
@settings(max_examples=60, deadline=None)
def test_best_is_brute_force(case):
    assert search.best(*case) == brute_force(*case)


@given(small_cases(), st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_best_is_brute_force_with_rational_window_times(case, sixths, extra):
    num_steps, degree, _, cost = case

    def window_cost(size):
        return Fraction(sixths[size - 1], 6)

    shortest = min(search.depth(plan, window_cost) for plan in all_plans(num_steps, degree))
    depth = shortest + Fraction(extra, 10)
    found = search.best(num_steps, degree, depth, cost, window_cost)
    assert found == brute_force(num_steps, degree, depth, cost, window_cost)
    with pytest.raises(PlanMismatch, match=f"at least {shortest}"):
        search.best(num_steps, degree, shortest - Fraction(1, 7), cost, window_cost)


@given(noise_grids(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_tail_is_brute_force(noise, degree):
    num_steps = len(noise) - 1
    degree = min(degree, num_steps)

    def cost(start, size):
        return search.tail_cost(noise, start, size)

    depth = search.default_depth(num_steps, degree)
    found = search.tail(noise, degree, depth)
    assert summed(found, cost) == summed(brute_force(num_steps, degree, depth, cost), cost)
    search.check(found, num_steps, degree)


@given(noise_grids(most=40), st.integers(1, 9), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_tail_is_always_feasible(noise, degree, extra):
    num_steps = len(noise) - 1
    degree = min(degree, num_steps)
    depth = search.least_depth(num_steps, degree) + extra
    plan = search.tail(noise, degree, depth)
    search.check(plan, num_steps, degree)
    assert search.depth(plan) <= depth


def test_brute_force_notices_ties_broken_the_other_way():
    def free(start, size):
        return 0.0

    assert search.best(5, 2, 4, free) == (1, 2, 2)
    # The mutant takes the smaller window first among equals.
    assert min(plan for plan in all_plans(5, 2) if len(plan) <= 4) != brute_force(5, 2, 4, free)


def test_brute_force_notices_exact_steps_at_the_wrong_end():
    noise = flow_noise(10, 3)

    def cost(start, size):
        return search.tail_cost(noise, start, size)

    found = brute_force(10, 3, 6, cost)
    assert search.tail(noise, 3, 6) == found
    assert summed(search.published(10, 3, 3), cost) > summed(found, cost)


def test_more_depth_than_steps_is_all_exact():
    assert search.tail(flow_noise(4, 3), 4, 99) == (1, 1, 1, 1)


@pytest.mark.parametrize(("num_steps", "degree", "depth"), [(50, 8, 7), (9, 8, 1), (2, 1, 1)])
def test_too_small_a_depth_names_the_least(num_steps, degree, depth):
    least = search.least_depth(num_steps, degree)
    message = f"depth {depth} is too small for {num_steps} steps on {degree} .* least {least}"
    with pytest.raises(PlanMismatch, match=message):
        search.tail(flow_noise(num_steps, 3), degree, depth)
    search.tail(flow_noise(num_steps, 3), degree, least)


@pytest.mark.parametrize("degree", [0, 6])
def test_degree_must_fit_the_steps(degree):
    for make in (
        lambda: search.published(5, degree, 1),
        lambda: search.tail(flow_noise(5, 3), degree, 5),
        lambda: search.check((1,) * 5, 5, degree),
        lambda: search.default_depth(5, degree),
    ):
        with pytest.raises(PlanMismatch, match=f"step={degree} for 5"):
            make()


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_tail_refuses_sigmas(bad):
    with pytest.raises(PlanMismatch, match=r"outside \[0, 1\]"):
        search.tail([1.0, bad, 0.0], 2, 2)


@pytest.mark.parametrize("bad", [0.5, 0, Fraction(-1, 2)])
def test_best_refuses_window_times_it_cannot_compare(bad):
    with pytest.raises(PlanMismatch, match=r"window_cost\(1\)"):
        search.best(4, 2, 3, lambda start, size: 0.0, lambda size: bad)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((1, 2, 2), "cover 5 steps, the scheduler takes 6"),
        ((), "cover 0 steps, the scheduler takes 6"),
        ((2, 2, 2), "first window is 2"),
        ((1, 2, 3), "window 2 has size 3, allowed is 1..2"),
        ((1, 0, 2, 2, 1), "window 1 has size 0"),
    ],
)
def test_check_shows_both_sides(windows, message):
    with pytest.raises(PlanMismatch, match=message):
        search.check(windows, 6, 2)


def test_calls_count_what_each_rank_evaluates():
    plan = (1, 4, 3, 2, 1, 1)
    assert [search.calls(plan, rank) for rank in range(4)] == [6, 6, 5, 4]
    assert search.calls(plan, 0) == search.depth(plan)


@given(small_cases())
@settings(max_examples=30, deadline=None)
def test_calls_cover_every_parallel_step_once(case):
    num_steps, degree, _, _ = case
    plan = search.best(*case)
    exact = plan.count(1)
    parallel = sum(search.calls(plan, rank) - exact for rank in range(degree))
    assert parallel == num_steps - exact


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_costs_that_are_not_finite_forbid_windows(bad):
    def cost(start, size):
        return bad if size == 3 else 0.0

    assert search.best(7, 3, 4, cost) == (1, 2, 2, 2)
    with pytest.raises(PlanMismatch, match="no finite cost from step 0 of 7 within depth 3"):
        search.best(7, 3, 3, cost)
