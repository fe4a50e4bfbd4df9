import math

import numpy as np
import pytest
import torch

from stretto.diffusion import quality
from stretto.errors import ConfigError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_of_a_constant_error():
    reference = random(2, 3, 4, 4)
    found = quality.psnr(reference + 0.1, reference, data_range=2)
    assert found.data_range == 2.0
    # 10 log10(2^2 / 0.1^2)
    for value in (found.mean, found.worst_item, found.worst_frame):
        assert value == pytest.approx(20 * math.log10(20))
    assert quality.psnr(reference + 0.1, reference, data_range=1).mean == pytest.approx(20)


def test_psnr_separates_pool_item_and_frame():
    reference = torch.zeros(2, 5, 3, 4, 4)
    x = reference.clone()
    x[1, 3] = 0.1  # one frame of ten
    found = quality.psnr(x, reference, data_range=1, frame_dim=1)
    assert found.mean == pytest.approx(30)
    assert found.worst_item == pytest.approx(20 + 10 * math.log10(5))
    assert found.worst_frame == pytest.approx(20)
    channels_first = quality.psnr(
        x.transpose(1, 2), reference.transpose(1, 2), data_range=1, frame_dim=-3
    )
    assert channels_first == found
    assert quality.psnr(x, reference, data_range=1).worst_frame == found.worst_item


def test_psnr_of_equal_tensors_is_infinite():
    x = random(2, 8).to(torch.bfloat16)
    found = quality.psnr(x, x.clone(), data_range=1)
    assert found.mean == found.worst_item == found.worst_frame == math.inf


def test_psnr_accumulates_beyond_the_inputs_dtype():
    reference = torch.full((1, 4096), 2.0, dtype=torch.float16)
    x = reference + 100  # the sum of squares is above float16's largest value
    assert quality.psnr(x, reference, data_range=100).mean == pytest.approx(0.0)


def test_a_nan_is_not_a_good_score():
    x = torch.tensor([[1.0, math.nan]])
    assert math.isnan(quality.psnr(x, torch.ones(1, 2), data_range=1).mean)
    assert math.isnan(quality.relative_l2(x, torch.ones(1, 2)))


def test_relative_l2():
    reference = torch.tensor([[3.0, 4.0]])
    assert quality.relative_l2(reference + torch.tensor([0.0, 0.5]), reference) == 0.1
    assert quality.relative_l2(reference, reference) == 0.0
    assert quality.relative_l2(reference, 0 * reference) == math.inf
    assert quality.relative_l2(0 * reference, 0 * reference) == 0.0


def ssim_by_loops(x, y, data_range):
    """SSIM of two (H, W) arrays, one window at a time."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (z[top : top + 11, left : left + 11] for z in (x, y))
            mean_a, mean_b = np.sum(weights * a), np.sum(weights * b)
            var_a = np.sum(weights * (a - mean_a) ** 2)
            var_b = np.sum(weights * (b - mean_b) ** 2)
            cov = np.sum(weights * (a - mean_a) * (b - mean_b))
            top_line = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            values.append(top_line / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


def test_ssim_is_its_definition():
    x, y = random(2, 3, 13, 16), random(2, 3, 13, 16, seed=1)
    y = x + 0.3 * y
    expected = np.mean(
        [
            ssim_by_loops(a.numpy(), b.numpy(), 2.0)
            for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)
        ]
    )
    assert quality.ssim(x, y, data_range=2) == pytest.approx(expected, rel=1e-10)
    assert quality.ssim(x, x, data_range=2) == pytest.approx(1.0, abs=1e-12)
    assert quality.ssim(x, y, data_range=20) > quality.ssim(x, y, data_range=2)


def test_ssim_of_flat_images_compares_luminance_only():
    a, b, c1 = 0.2, 0.7, 1e-4
    x, y = torch.full((1, 1, 11, 11), a), torch.full((1, 1, 11, 11), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert quality.ssim(x, y, data_range=1) == pytest.approx(expected, rel=1e-5)


def test_log_spectral_distance_of_a_gain_is_the_gain_in_decibels():
    x = random(2, 5000)
    found = quality.log_spectral_distance(0.5 * x, x, floor=0)
    assert found == pytest.approx(20 * math.log10(2), rel=1e-9)
    assert quality.log_spectral_distance(x, x) == 0.0


def test_log_spectral_distance_is_its_definition():
    x, y = random(1, 80), random(1, 80, seed=1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    frames = []
    for start in range(0, 80 - 32 + 1, 16):
        powers = [
            np.abs(np.fft.rfft(window * z[0, start : start + 32].numpy())) ** 2 for z in (x, y)
        ]
        frames.append(np.sqrt(np.mean((10 * np.log10(powers[0] / powers[1])) ** 2)))
    found = quality.log_spectral_distance(x, y, window=32, hop=16, floor=0)
    assert found == pytest.approx(np.mean(frames), rel=1e-9)


def test_silence_gives_finite_distances():
    x, silence = random(1, 2048), torch.zeros(1, 2048)
    assert quality.log_spectral_distance(silence, silence) == 0.0
    assert 0 < quality.log_spectral_distance(silence, x) < 110  # floor 1e-10 is 100 dB down
    assert math.isfinite(quality.log_spectral_distance(x, silence))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quality.psnr(random(2, 3), random(3, 2), data_range=1), r"\(2, 3\).*\(3, 2\)"),
        (lambda: quality.psnr(random(0, 3), random(0, 3), data_range=1), "hold elements"),
        (lambda: quality.psnr(random(2, 3), random(2, 3), data_range=0), "data_range is 0"),
        (lambda: quality.psnr(random(2, 3), random(2, 3), data_range=1, frame_dim=-2), "dim 0"),
        (lambda: quality.relative_l2(random(2), random(3)), "cannot compare"),
        (lambda: quality.ssim(random(1, 1, 10, 11), random(1, 1, 10, 11), data_range=1), "11"),
        (lambda: quality.ssim(random(1, 11, 11), random(1, 11, 11), data_range=1), "B, C, H, W"),
        (lambda: quality.log_spectral_distance(random(1, 99), random(1, 99)), "1024 samples"),
        (lambda: quality.log_spectral_distance(random(99), random(99)), r"\(B, T\)"),
    ],
)
def test_unusable_inputs_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
