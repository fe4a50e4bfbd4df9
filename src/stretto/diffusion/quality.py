"""How far a result lies from a reference: PSNR, relative L2, SSIM, log-spectral distance.

Every function takes two tensors of one shape, any dtype and device, computes in float64 and
returns Python floats. Dim 0 counts items (images, videos, waveforms). No learned metric.

B items   C channels   H height   W width   T samples of audio
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stretto.errors import ConfigError

# SSIM: Gaussian window, standard deviation in pixels, and constants of Wang et al. 2004.
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


@dataclass(frozen=True, slots=True)
class Psnr:
    """Peak signal to noise ratio in dB for a stated data range; inf where nothing differs.

    average: of the items' own PSNR, those that do not differ left out (inf if none differs);
    mean: of the squared error pooled over everything, so that of the worst items;
    worst_item, worst_frame: the smallest of one item, of one frame of one item (equal to
    worst_item where there are no frames).
    """

    data_range: float
    average: float
    mean: float
    worst_item: float
    worst_frame: float


def psnr(x: Tensor, reference: Tensor, *, data_range: float, frame_dim: int | None = None) -> Psnr:
    """PSNR of x against reference, (B, ...) both; data_range is the largest possible difference.

    frame_dim names the frames of videos, a dim other than 0. Images in [-1, 1] have range 2.
    Raises ConfigError if shapes differ, are empty, or data_range is not above 0.
    """
    _check_pair(x, reference)
    if not data_range > 0:
        raise ConfigError(f"data_range is {data_range}: it must be above 0, as 1 for [0, 1]")
    squares_BN = (x.double() - reference.double()).square()
    if frame_dim is None:
        frames_BN = squares_BN.flatten(1).mean(1, keepdim=True)
    else:
        if frame_dim % x.dim() == 0:
            raise ConfigError(f"frame_dim {frame_dim} of {tuple(x.shape)} is dim 0, the items")
        frames_BN = squares_BN.movedim(frame_dim, 1).flatten(2).mean(2)
    items = [_decibel(square, data_range) for square in frames_BN.mean(1)]
    differing = [item for item in items if math.isfinite(item)]
    return Psnr(
        data_range=float(data_range),
        average=sum(differing) / len(differing) if differing else math.inf,
        mean=_decibel(frames_BN.mean(), data_range),
        worst_item=_decibel(frames_BN.mean(1).max(), data_range),
        worst_frame=_decibel(frames_BN.max(), data_range),
    )


def relative_l2(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference| over all elements; 0 if equal, inf if only reference is 0.

    Raises ConfigError if shapes differ or are empty.
    """
    _check_pair(x, reference)
    error = (x.double() - reference.double()).norm().item()
    if error == 0.0:
        return 0.0
    size = reference.double().norm().item()
    return error / size if size > 0 else math.inf


def ssim(x_BCHW: Tensor, reference_BCHW: Tensor, *, data_range: float) -> float:
    """Structural similarity, 1 for equal images: mean over items, channels and window positions.

    Gaussian windows of 11 x 11 pixels that lie inside the image (no padding).
    Raises ConfigError if shapes differ, are not (B, C, H, W), or H or W is below 11.
    Source: Wang et al. 2004.
    """
    _check_pair(x_BCHW, reference_BCHW)
    if x_BCHW.dim() != 4 or min(x_BCHW.shape[2:]) < _SSIM_WINDOW:
        raise ConfigError(
            f"ssim of shape {tuple(x_BCHW.shape)}: needs (B, C, H, W) with H and W at least "
            f"{_SSIM_WINDOW}\n"
            "  why: the window must fit the image\n"
            "  to fix: move the frames of a video into B; use psnr for smaller images"
        )
    x, y = x_BCHW.double().flatten(0, 1)[:, None], reference_BCHW.double().flatten(0, 1)[:, None]
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * data_range) ** 2, (_SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean().item()


def log_spectral_distance(
    x_BT: Tensor,
    reference_BT: Tensor,
    *,
    window: int = 1024,
    hop: int = 256,
    floor: float = 1e-10,
) -> float:
    """Distance of short-time power spectra in dB: rms over frequencies, mean over frames, items.

    window and hop in samples, Hann window, no padding. Powers are raised by `floor`, relative to
    the reference's largest (of each item), so that silence does not dominate; a silent reference
    takes it as it is.
    Raises ConfigError if shapes differ, are not (B, T), or T is below window.
    Source: Gray and Markel 1976.
    """
    _check_pair(x_BT, reference_BT)
    if x_BT.dim() != 2 or x_BT.shape[1] < window:
        raise ConfigError(
            f"log_spectral_distance of shape {tuple(x_BT.shape)}: needs (B, T) with T at least "
            f"the window, {window} samples\n"
            "  to fix: move channels into B, or take a shorter window"
        )
    power_x, power_y = _powers(x_BT, window, hop), _powers(reference_BT, window, hop)
    largest = power_y.amax((1, 2), keepdim=True)
    least = floor * torch.where(largest > 0, largest, torch.ones_like(largest))
    difference = 10 * ((power_x + least).log10() - (power_y + least).log10())
    return difference.square().mean(1).sqrt().mean().item()


def _check_pair(x: Tensor, reference: Tensor) -> None:
    if x.shape != reference.shape or x.numel() == 0 or x.dim() == 0:
        raise ConfigError(
            f"cannot compare shape {tuple(x.shape)} with reference {tuple(reference.shape)}: "
            "shapes must be equal, with a dim of items, and hold elements"
        )


def _decibel(mean_square: Tensor, data_range: float) -> float:
    value = mean_square.item()
    return 10 * math.log10(data_range**2 / value) if value != 0 else math.inf


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted mean of every window inside (B, 1, H, W)."""
    at = torch.arange(_SSIM_WINDOW, dtype=x.dtype, device=x.device) - _SSIM_WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * _SSIM_SIGMA**2))
    weights = weights / weights.sum()
    rows = functional.conv2d(x, weights.view(1, 1, -1, 1))
    return functional.conv2d(rows, weights.view(1, 1, 1, -1))


def _powers(x_BT: Tensor, window: int, hop: int) -> Tensor:
    """(B, frequencies, frames) squared magnitudes of the short-time Fourier transform."""
    hann = torch.hann_window(window, dtype=torch.float64, device=x_BT.device)
    spectra = torch.stft(x_BT.double(), window, hop, window=hann, center=False, return_complex=True)
    return spectra.abs().square()
