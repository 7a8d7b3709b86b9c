"""Numbers for pictures and for counts: PSNR, SSIM, distances in MobileNetV2's features, intervals.

Pixels are (B,3,H,W) in [0,1]. The feature distances carry the name of their network: they compare with each
other and never with the published scores of other feature networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.evaluation.distances import frechet_distance

Z95 = 1.959964  # half the width of a normal distribution's middle 95 %
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03  # [Wang 2004, section III.C]
PSNR_CEILING = 100.0  # decibels reported for equal pictures


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `count` observations."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: float, trials: int) -> Estimate:
    """A share and its Wilson interval [Wilson 1927], sound for few trials and for shares near 0 and 1.

    `successes` may count halves, such as ties.

    >>> round(wilson(50, 100).low, 3)
    0.404
    """
    if trials == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    share = successes / trials
    centre = (share + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    half = Z95 / (1 + Z95**2 / trials) * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Estimate(share, low, high, trials)


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean and its normal interval; without width for fewer than two values."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, mean, mean, len(values))
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = Z95 * math.sqrt(variance / len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def amount(number: int, thing: str) -> str:
    """How many, in words: "1 vote", "2 votes"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, one per picture (B,), at most PSNR_CEILING."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return (-10 * torch.log10(error)).clamp(max=PSNR_CEILING)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [Wang 2004, eq. 13] with a Gaussian window, mean over channels and places
    (B,)."""
    reach = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    bell = torch.exp(-(reach**2) / (2 * SSIM_SIGMA**2))
    bell = bell / bell.sum()
    channels = a.shape[1]

    def smooth(x: Tensor) -> Tensor:
        rows = bell.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        columns = bell.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)

    a, b = a.double().cpu(), b.double().cpu()
    mean_a, mean_b = smooth(a), smooth(b)
    variance_a, variance_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (top / bottom).mean((1, 2, 3))


def mobilenet_paired_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine between features (B,N) of picture pairs: 0 for equal ones, at most 2 (B,)."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=1)


def mobilenet_frechet_distance(a: Tensor, b: Tensor) -> float:
    """`distances.frechet_distance` of MobileNetV2's features (N,D), (M,D)."""
    return frechet_distance(a, b)
