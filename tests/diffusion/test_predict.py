import contextlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stretto.diffusion.predict import make_predictor
from stretto.errors import ConfigError
from stretto.plan.options import PREDICTORS

NOISE = [1.0, 0.96, 0.9, 0.83, 0.7, 0.55, 0.4, 0.2, 0.05]


def tensors(num, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num)
    ]


def feed(predictor, values, windows):
    """Append values window by window, closing each."""
    start = 0
    for size in windows:
        for index in range(start, start + size):
            predictor.append(NOISE[index], values[index])
        predictor.close_window(start, size)
        start += size
    return predictor


@contextlib.contextmanager
def autocast_on_a_gpu():
    """What `torch.autocast("cuda")` sets, which it refuses to where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def guess(predictor, s, horizon):
    """The guess at one horizon; what stands at nearer ones does not matter to it."""
    return predictor.guesses([s] * horizon)[-1]


def relative(x, reference):
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", sorted(set(PREDICTORS) - {"own"}))
def test_one_entry_repeats(name):
    (g,) = tensors(1, torch.float32)
    predictor = feed(make_predictor(name), [g], [1])
    assert all(torch.equal(guess(predictor, NOISE[h], h), g) for h in (1, 2, 3))


@pytest.mark.parametrize("name", sorted(set(PREDICTORS) - {"own"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_constant_velocity_is_reproduced_bitwise(name, dtype):
    (g,) = tensors(1, dtype)
    predictor = feed(make_predictor(name), [g.clone() for _ in range(5)], [1, 1, 3])
    for horizon in (1, 2, 4):
        found = guess(predictor, NOISE[4 + horizon], horizon)
        assert found.dtype == dtype
        assert torch.equal(found, g)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_exact_for_its_polynomials_and_not_for_the_next(order):
    coefficients = tensors(5)

    def polynomial(s, degree):
        return sum(c * s**power for power, c in enumerate(coefficients[: degree + 1]))

    for degree in (order, order + 1):
        values = [polynomial(s, degree) for s in NOISE]
        predictor = feed(make_predictor(f"taylor-{order}"), values, [1] * 5)
        errors = [
            relative(guess(predictor, NOISE[at], at - 4), polynomial(NOISE[at], degree))
            for at in (5, 6, 8)
        ]
        assert max(errors) < 1e-12 if degree == order else min(errors) > 1e-6


def test_extrapolation_by_step_index_would_not_be_exact():
    start, slope = tensors(2)
    values = [start + slope * s for s in NOISE]
    by_index = values[4] + (values[4] - values[3])  # the mutant
    assert relative(by_index, values[5]) > 1e-3


@pytest.mark.parametrize(("name", "order"), [("repeat", 1), ("taylor-1", 2), ("taylor-2", 3)])
def test_guess_error_falls_at_the_predicted_order(name, order):
    def error(width):
        grid = [0.6 - width * step for step in range(5)]
        predictor = make_predictor(name)
        for s in grid[:4]:
            predictor.append(s, torch.tensor([math.exp(3 * s)], dtype=torch.float64))
        return abs(float(guess(predictor, grid[4], 1)) - math.exp(3 * grid[4]))

    rates = [math.log2(error(width) / error(width / 2)) for width in (0.02, 0.01)]
    assert all(abs(rate - order) < 0.25 for rate in rates)


@pytest.mark.parametrize("true_damping", [0.0, 0.3, 1.0])
def test_fit_recovers_the_damping_of_the_last_window(true_damping):
    first, second = tensors(2)
    slope = (second - first) / (NOISE[1] - NOISE[0])
    values = [first, second]
    values += [second + true_damping * slope * (s - NOISE[1]) for s in NOISE[2:5]]
    predictor = feed(make_predictor("damped"), values, [1, 1, 3])
    assert predictor.damping == pytest.approx({1: true_damping, 2: true_damping, 3: true_damping})
    slope = (values[4] - values[3]) / (NOISE[4] - NOISE[3])
    expected = values[4] + true_damping * slope * (NOISE[6] - NOISE[4])
    assert relative(guess(predictor, NOISE[6], 2), expected) < 1e-12


@pytest.mark.parametrize(("factor", "clipped"), [(-0.5, 0.0), (1.7, 1.0)])
def test_fit_is_clipped(factor, clipped):
    first, second = tensors(2)
    slope = (second - first) / (NOISE[1] - NOISE[0])
    values = [first, second, second + factor * slope * (NOISE[2] - NOISE[1])]
    assert feed(make_predictor("damped"), values, [1, 1, 1]).damping == {1: clipped}


def test_damping_is_one_half_before_the_first_fit_of_a_horizon():
    values = tensors(3)
    predictor = feed(make_predictor("damped"), values[:2], [1, 1])
    assert predictor.damping == {}
    line = (values[1] - values[0]) / (NOISE[1] - NOISE[0])
    expected = values[1] + 0.5 * line * (NOISE[4] - NOISE[1])
    assert relative(guess(predictor, NOISE[4], 3), expected) < 1e-12
    # Horizon 1 is now fitted, horizon 3 still is not.
    predictor.append(NOISE[2], values[2])
    predictor.close_window(2, 1)
    assert set(predictor.damping) == {1}
    line = (values[2] - values[1]) / (NOISE[2] - NOISE[1])
    expected = values[2] + 0.5 * line * (NOISE[5] - NOISE[2])
    assert relative(guess(predictor, NOISE[5], 3), expected) < 1e-12


def test_an_early_window_is_fitted_from_its_own_first_predictions():
    first, slope = tensors(2)
    values = [first + slope * s for s in NOISE[:5]]
    predictor = feed(make_predictor("damped"), values, [1, 4])
    assert predictor.damping == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})


def test_later_windows_replace_a_fit_only_where_they_reach():
    values = tensors(8)
    predictor = feed(make_predictor("damped"), values[:5], [1, 1, 3])
    before = predictor.damping
    for index in (5, 6):
        predictor.append(NOISE[index], values[index])
    predictor.close_window(5, 2)
    after = predictor.damping
    assert after[3] == before[3]
    step = (values[4] - values[3]) / (NOISE[4] - NOISE[3])
    for horizon in (1, 2):
        change = step * (NOISE[4 + horizon] - NOISE[4])
        fit = float((change * (values[4 + horizon] - values[4])).sum() / (change**2).sum())
        assert after[horizon] == pytest.approx(min(max(fit, 0.0), 1.0))


def test_a_flat_history_leaves_the_fit_alone():
    first, other = tensors(2)
    predictor = feed(make_predictor("damped"), [first, first, other], [1, 1, 1])
    assert predictor.damping == {1: 0.5}


def test_stored_damping_is_used_per_horizon_and_never_refitted():
    values = tensors(5)
    predictor = feed(make_predictor("damped", (0.9, 0.2)), values, [1, 1, 3])
    assert predictor.damping == {1: 0.9, 2: 0.2}
    line = (values[4] - values[3]) / (NOISE[4] - NOISE[3])
    for horizon, damping in ((1, 0.9), (2, 0.2)):
        expected = values[4] + damping * line * (NOISE[4 + horizon] - NOISE[4])
        assert relative(guess(predictor, NOISE[4 + horizon], horizon), expected) < 1e-12
    with pytest.raises(ConfigError, match="2 horizons, a window asks for 3"):
        guess(predictor, NOISE[7], 3)


def test_stored_zero_repeats_and_stored_one_is_taylor_1():
    values = tensors(3, torch.float32)
    zero = feed(make_predictor("damped", [0.0] * 3), values, [1] * 3)
    one = feed(make_predictor("damped", [1.0] * 3), values, [1] * 3)
    taylor = feed(make_predictor("taylor-1"), values, [1] * 3)
    assert torch.equal(guess(zero, NOISE[4], 2), values[2])
    assert torch.equal(guess(one, NOISE[4], 2), guess(taylor, NOISE[4], 2))


@pytest.mark.parametrize("name", ["repeat", "damped", "taylor-1", "taylor-2", "taylor-3"])
def test_a_repeated_abscissa_keeps_the_newer_prediction(name):
    values = tensors(4)
    twice, once = make_predictor(name), make_predictor(name)
    for index, (s, g) in enumerate(
        [(0.9, values[0]), (0.7, values[3]), (0.7, values[1]), (0.5, values[3]), (0.5, values[2])]
    ):
        twice.append(s, g)
        twice.close_window(index, 1)
    for index, (s, g) in enumerate([(0.9, values[0]), (0.7, values[1]), (0.5, values[2])]):
        once.append(s, g)
        once.close_window(index, 1)
    found, expected = guess(twice, 0.4, 2), guess(once, 0.4, 2)
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)
    assert torch.equal(guess(twice, 0.5, 1), values[2])


def test_sums_are_float32_and_the_output_keeps_its_dtype():
    values = tensors(3, torch.bfloat16, seed=3)
    found = guess(feed(make_predictor("taylor-1"), values, [1] * 3), NOISE[3], 1)
    wide = feed(make_predictor("taylor-1"), [v.double() for v in values], [1] * 3)
    assert torch.equal(found, guess(wide, NOISE[3], 1).to(torch.bfloat16))
    ratio = (NOISE[3] - NOISE[2]) / (NOISE[2] - NOISE[1])
    narrow = values[2] + (values[2] - values[1]) * ratio  # the mutant: bfloat16 sums
    assert not torch.equal(found, narrow)


def test_equal_histories_give_equal_bits_and_reset_forgets():
    values = tensors(6, torch.float32)
    ranks = [feed(make_predictor("damped"), values, [1, 3, 2]) for _ in range(2)]
    guess(ranks[1], NOISE[6], 1)  # a guess leaves no trace
    assert torch.equal(guess(ranks[0], NOISE[7], 2), guess(ranks[1], NOISE[7], 2))
    ranks[1].reset()
    assert ranks[1].damping == {}
    again = feed(ranks[1], values, [1, 3, 2])
    assert torch.equal(guess(ranks[0], NOISE[7], 2), guess(again, NOISE[7], 2))


def test_guess_does_not_write_to_what_it_was_given():
    values = tensors(5, torch.float32)
    copies = [value.clone() for value in values]
    guess(feed(make_predictor("damped"), values, [1, 1, 3]), NOISE[6], 2)
    assert all(torch.equal(*pair) for pair in zip(values, copies, strict=True))


def test_only_the_needed_history_is_kept():
    predictor = make_predictor("damped")
    alive = tensors(9)
    feed(predictor, alive, [1, 1, 3, 4])
    kept = {id(g) for _, g in predictor._known}
    assert kept == {id(alive[7]), id(alive[8])}


def test_a_window_closed_at_the_wrong_place_is_noticed():
    predictor = make_predictor("damped")
    predictor.append(1.0, tensors(1)[0])
    with pytest.raises(AssertionError, match="window 0\\+2 closes, but 1"):
        predictor.close_window(0, 2)


def test_guessing_before_the_first_prediction_is_noticed():
    with pytest.raises(AssertionError, match="first step"):
        make_predictor("repeat").guesses([0.5])


def test_own_leaves_guesses_to_the_pipeline():
    own = make_predictor("own")
    feed(own, tensors(2), [1, 1])
    assert own.needs_own_output
    with pytest.raises(AssertionError, match="recombined"):
        own.guesses([0.5])
    assert not any(make_predictor(name).needs_own_output for name in set(PREDICTORS) - {"own"})


@pytest.mark.parametrize("name", sorted(set(PREDICTORS) - {"own"}))
def test_guesses_of_a_window_are_those_made_one_by_one(name):
    values = tensors(5, torch.float32)
    predictor = feed(make_predictor(name), values, [1, 1, 3])
    together = predictor.guesses(NOISE[5:])
    assert len(together) == 4
    assert not predictor.guesses([])
    for horizon, found in enumerate(together, start=1):
        assert torch.equal(found, guess(predictor, NOISE[4 + horizon], horizon))


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"'tailor-2' is unknown; known are damped.*\n.*taylor-2"):
        make_predictor("tailor-2")
    with pytest.raises(ConfigError, match="'xyz' is unknown") as caught:
        make_predictor("xyz")
    assert "nearest" not in str(caught.value)


@pytest.mark.parametrize("damping", [(0.5, 1.5), (-0.1,), (float("nan"),)])
def test_damping_outside_its_range_is_refused(damping):
    with pytest.raises(ConfigError, match=r"damping of horizon .* outside \[0, 1\]"):
        make_predictor("damped", damping)


@pytest.mark.parametrize("name", ["repeat", "own", "taylor-1"])
def test_damping_belongs_to_damped_only(name):
    with pytest.raises(ConfigError, match=f"'{name}' takes no stored damping"):
        make_predictor(name, (0.5,))
    assert make_predictor(name, ()).damping == {}


class HostReads(TorchDispatchMode):
    """Names of operations that make the host wait for a device, on any device."""

    WAITING = ("lift_fresh", "_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(set(PREDICTORS) - {"own"}))
def test_no_prediction_waits_for_the_device(name):
    values = tensors(9, torch.float32)
    predictor = make_predictor(name)
    with HostReads() as reads:
        feed(predictor, values, [1, 2, 4])
        guess(predictor, NOISE[8], 2)
    assert reads.found == []
    with HostReads() as reads:
        values[0].new_tensor(0.5)
    assert reads.found, "the mode sees a value that is copied from the host"


def test_stages_of_one_noise_level_leave_the_fit_alone():
    """Heun's second stage repeats its level: between the two lies no change to learn from."""
    values = tensors(5)
    predictor = make_predictor("damped")
    for index, s in enumerate([0.9, 0.7, 0.7, 0.5]):
        predictor.append(s, values[index])
        if index == 1:
            predictor.close_window(0, 2)
    predictor.close_window(2, 2)
    assert predictor.damping[1] == 0.5
    assert predictor.damping[2] != 0.5


def test_autocast_on_a_gpu_leaves_sums_wide(monkeypatch):
    """Squares of latents overflow in float16. Tensors without memory stand in for a GPU's."""
    seen, product = [], torch.mv

    def spied(matrix, vector):
        seen.append(product(matrix, vector).dtype)
        return torch.ones(len(matrix))

    monkeypatch.setattr(torch, "mv", spied)
    monkeypatch.setattr("stretto.diffusion.predict.on_device", lambda host, device: host)
    predictor = make_predictor("damped")
    with FakeTensorMode(allow_non_fake_inputs=True), autocast_on_a_gpu():
        g = torch.empty(2, 3, dtype=torch.bfloat16, device="cuda")
        feed(predictor, [g] * 3, [1, 1, 1])
    assert seen == [torch.float32]


def test_autocast_of_one_half_precision_takes_predictions_of_another():
    predictor = make_predictor("damped")
    values = [value.half() for value in tensors(4)]
    with torch.autocast("cpu", torch.bfloat16):
        feed(predictor, values, [1, 1, 2])
    assert set(predictor.damping) == {1, 2}
