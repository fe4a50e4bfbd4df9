import itertools

import numpy as np
import pytest
import torch

from stretto.diffusion import naive
from stretto.diffusion.predict import make_predictor
from stretto.search import windows as search

SHIFT = 3.0


def flow_noise(num_steps):
    times = [1 - step / num_steps for step in range(num_steps)]
    return [SHIFT * t / (1 + (SHIFT - 1) * t) for t in times] + [0.0]


def euler(noise):
    return lambda x, g, i: x + (noise[i + 1] - noise[i]) * g


def mixture(noise, num_parts=6, dims=16, width=0.2, seed=0):
    """Exact flow velocity for data drawn from a mixture of round Gaussians.

    x = (1 - s) data + s white noise; the velocity is (x - E[data | x]) / s in closed form.
    """
    centres_KD = np.random.default_rng(seed).normal(size=(num_parts, dims))

    def denoise(x_ND, i):
        s = noise[i]
        variance = ((1 - s) * width) ** 2 + s**2
        offset_NKD = x_ND[:, None] - (1 - s) * centres_KD
        log_NK = -(offset_NKD**2).sum(-1) / (2 * variance)
        weight_NK = np.exp(log_NK - log_NK.max(1, keepdims=True))
        weight_NK /= weight_NK.sum(1, keepdims=True)
        part_NKD = centres_KD + (1 - s) * width**2 / variance * offset_NKD
        return (x_ND - (weight_NK[..., None] * part_NKD).sum(1)) / s

    return denoise


@pytest.fixture
def problem():
    noise = flow_noise(20)
    x = np.random.default_rng(7).normal(size=(5, 16))
    return noise, mixture(noise), euler(noise), x


def distance(latents, other):
    return np.linalg.norm(latents[-1] - other[-1]) / np.linalg.norm(other[-1])


def equal(latents, other):
    return len(latents) == len(other) and all(map(np.array_equal, latents, other))


def perfect(outputs):
    return lambda known, bounds, noise, horizon: outputs[len(known) + horizon - 1]


def recorded(denoise, latents):
    return [denoise(x, i) for i, x in enumerate(latents[:-1])]


def test_the_mixture_velocity_is_the_gradient_of_its_density(problem):
    """v = -(x + s score) / (1 - s), with the score by finite differences of the log density."""
    noise, denoise, _, x = problem
    centres = np.random.default_rng(0).normal(size=(6, 16))
    step = 8
    s = noise[step]
    variance = ((1 - s) * 0.2) ** 2 + s**2

    def log_density(point):
        parts = -((point - (1 - s) * centres) ** 2).sum(-1) / (2 * variance)
        return np.log(np.exp(parts - parts.max()).sum()) + parts.max()

    shifts = 1e-5 * np.eye(16)
    score = np.array([(log_density(x[0] + d) - log_density(x[0] - d)) / 2e-5 for d in shifts])
    np.testing.assert_allclose(denoise(x, step)[0], -(x[0] + s * score) / (1 - s), rtol=1e-6)


def test_degree_one_is_the_sequential_loop(problem):
    noise, denoise, step, x = problem
    expected = naive.sequential(denoise, step, x, 20)
    assert equal(naive.published(denoise, step, x, 20, 1, 3), expected)
    for guess in (naive.repeat, naive.damped):
        assert equal(naive.replay(denoise, step, x, (1,) * 20, noise, guess), expected)


def test_warmup_over_all_steps_is_the_sequential_loop(problem):
    _, denoise, step, x = problem
    expected = naive.sequential(denoise, step, x, 20)
    assert equal(naive.published(denoise, step, x, 20, 4, 20), expected)


@pytest.mark.parametrize("windows", [(1, 4, 4, 4, 4, 3), (1, 2, 1, 5, 5, 4, 1, 1)], ids=str)
def test_perfect_guesses_are_bitwise_sequential(problem, windows):
    noise, denoise, step, x = problem
    expected = naive.sequential(denoise, step, x, 20)
    outputs = recorded(denoise, expected)
    assert equal(naive.replay(denoise, step, x, windows, noise, perfect(outputs)), expected)
    # The mutant is one horizon late.
    late = perfect([outputs[0], *outputs])
    assert not equal(naive.replay(denoise, step, x, windows, noise, late), expected)


def test_published_by_hand():
    """Three ranks, one warm-up step, seven steps, written out; denoise is quadratic."""

    def denoise(x, i):
        return x * x / 10 + i / 7

    def step(x, g, i):
        return x - 0.1 * g

    x = np.array([1.0])
    g0 = denoise(x, 0)
    x1 = step(x, g0, 0)
    first = denoise(x1, 1)
    second = denoise(step(x1, g0, 1), 2)
    third = denoise(step(step(x1, g0, 1), g0, 2), 3)
    x4 = step(step(step(x1, first, 1), second, 2), third, 3)
    # Second cycle: rank 1 reuses its own `second`, rank 2 its own `third`.
    fourth = denoise(x4, 4)
    fifth = denoise(step(x4, second, 4), 5)
    sixth = denoise(step(step(x4, third, 4), third, 5), 6)
    x7 = step(step(step(x4, fourth, 4), fifth, 5), sixth, 6)
    found = naive.published(denoise, step, x, 7, 3, 1)
    assert len(found) == 8
    assert (found[1], found[4], found[7]) == (x1, x4, x7)


def test_own_cache_is_newest_reuse_for_two_ranks_and_staler_for_three(problem):
    noise, denoise, step, x = problem

    def pair(num_steps, degree):
        windows = search.published(num_steps, degree, 4)
        return (
            naive.published(denoise, step, x, num_steps, degree, 4),
            naive.replay(denoise, step, x, windows, noise, naive.repeat),
        )

    assert equal(*pair(20, 2))
    # Feeding the newest instead of the own cache is the mutation: it must change the result,
    for degree in (3, 4):
        assert not equal(*pair(20, degree))
        # but not before the second cycle, where both still know the last warm-up output only.
        own, newest = pair(20, degree)
        assert equal(own[: 4 + degree + 1], newest[: 4 + degree + 1])


def test_published_counts_a_short_last_cycle(problem):
    _, denoise, step, x = problem
    calls = []

    def counted(x, i):
        calls.append(i)
        return denoise(x, i)

    assert len(naive.published(counted, step, x, 18, 4, 3)) == 19
    # 3 warm-up steps and once more the last of them for the caches, then every step once.
    assert sorted(calls) == sorted([*range(18), 2])


def test_velocity_constant_in_time_and_place_is_exact():
    noise = flow_noise(12)
    velocity = np.array([0.3, -1.0])
    x = np.array([1.0, 2.0])
    arguments = (lambda x, i: velocity, euler(noise), x)
    expected = naive.sequential(*arguments, 12)
    assert equal(naive.published(*arguments, 12, 4, 3), expected)
    for guess in (naive.repeat, naive.damped):
        assert equal(naive.replay(*arguments, (1, 4, 4, 3), noise, guess), expected)


def test_velocity_linear_in_noise_is_guessed_exactly_once_fitted():
    """Guesses only steer where the denoiser looks: one that looks shows the wrong guess."""
    noise = flow_noise(12)
    arguments = (lambda x, i: np.array([2.0 - noise[i]]), euler(noise), np.array([1.0]))
    seen = []

    def denoise(x, i):
        seen.append((i, x.item()))
        return arguments[0](x, i)

    expected = naive.sequential(*arguments, 12)
    naive.replay(denoise, *arguments[1:], (1, 3, 3, 3, 2), noise, naive.damped)
    off = {i: abs(x - expected[i].item()) for i, x in seen}
    assert max(off[i] for i in range(4, 12)) < 1e-14  # after the first fit, in window 1..3
    assert off[3] > 1e-3  # one known prediction only: repeated


def test_tail_beats_the_published_schedule_on_the_mixture(problem):
    noise, denoise, step, x = problem
    expected = naive.sequential(denoise, step, x, 20)
    for degree, times in ((2, 1.5), (4, 9), (8, 70)):
        depth = search.default_depth(20, degree)
        plan = search.tail(noise, degree, depth)
        ours = naive.replay(denoise, step, x, plan, noise, naive.damped)
        theirs = naive.published(denoise, step, x, 20, degree, 5)
        assert len(search.published(20, degree, 5)) == depth
        assert 0 < distance(ours, expected) < distance(theirs, expected) / times


@pytest.mark.parametrize(("guess", "order"), [(naive.repeat, 2), (naive.damped, 3)])
def test_parallel_error_falls_with_the_number_of_steps_at_the_predicted_order(guess, order):
    """A guess of order k errs by h^(k+1), moves the latents by h^(k+2), summed over 1/h steps."""
    errors = []
    for num_steps in (40, 80, 160):
        noise = flow_noise(num_steps)
        denoise, step = mixture(noise, width=1.0), euler(noise)
        x = np.random.default_rng(7).normal(size=(5, 16))
        plan = search.published(num_steps, 3, 1)
        found = naive.replay(denoise, step, x, plan, noise, guess)
        errors.append(distance(found, naive.sequential(denoise, step, x, num_steps)))
    rates = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(rate - order) < 0.25 for rate in rates)


def torch_guess(name, damping=None):
    """The product's predictor behind the twin's signature, fed anew for every guess."""

    def guess(known, bounds, noise, horizon):
        predictor = make_predictor(name, damping)
        for start, end in itertools.pairwise(bounds):
            for i in range(start, end):
                predictor.append(noise[i], torch.from_numpy(known[i]))
            predictor.close_window(start, end - start)
        ahead = noise[len(known) : len(known) + horizon]
        return predictor.guesses(ahead)[-1].numpy()

    return guess


@pytest.mark.parametrize("windows", [(1, 4, 4, 4, 4, 3), (1, 1, 1, 5, 2, 5, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["repeat", "damped"])
def test_the_predictor_agrees_with_its_twin(problem, windows, name):
    noise, denoise, step, x = problem
    expected = naive.replay(denoise, step, x, windows, noise, getattr(naive, name))
    found = naive.replay(denoise, step, x, windows, noise, torch_guess(name))
    assert distance(found, expected) < 1e-12
    # Undamped is the mutation that this oracle must notice.
    mutant = naive.replay(denoise, step, x, windows, noise, torch_guess("taylor-1"))
    assert distance(mutant, expected) > 1e-9


def test_specification_fits_on_a_screen():
    with open(naive.__file__) as file:
        assert len(file.readlines()) <= 80
