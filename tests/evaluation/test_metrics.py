import math

import pytest
import torch

from triptych.evaluation.metrics import (
    PSNR_CEILING,
    mean_interval,
    mobilenet_frechet_distance,
    mobilenet_paired_distance,
    psnr,
    ssim,
    wilson,
)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(a, a).tolist() == [PSNR_CEILING, PSNR_CEILING]


def test_ssim_is_one_for_equal_pictures_and_known_for_flat_ones() -> None:
    a = torch.rand(2, 3, 32, 24)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert ssim(a, 1 - a).max() < 0.1
    low, high = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # only the luminance term is left
    assert float(ssim(low, high)) == pytest.approx(expected, rel=1e-5)


def test_ssim_falls_with_noise() -> None:
    a = torch.linspace(0, 1, 48).expand(1, 3, 48, 48)
    noise = torch.randn(1, 3, 48, 48)
    values = [float(ssim(a, a + s * noise)) for s in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 3, 0.0615, 0.7923)],
)
def test_wilson_intervals(successes: int, trials: int, low: float, high: float) -> None:
    estimate = wilson(successes, trials)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)
    assert estimate.low <= estimate.value <= estimate.high


def test_intervals_of_nothing_say_so() -> None:
    assert wilson(0, 0).count == 0
    assert math.isnan(mean_interval([]).value)
    assert mean_interval([2.0]).low == 2.0


def test_mean_interval_narrows_with_the_root_of_the_count() -> None:
    few, many = mean_interval([0.0, 1.0] * 50), mean_interval([0.0, 1.0] * 200)
    assert few.value == many.value == 0.5
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.02)


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 4, generator=generator)
    b = 2 * torch.randn(20_000, 4, generator=generator) + torch.tensor([1.0, 0, 0, 0])
    # |mean|^2 + trace(1 + 4 - 2 * 2) per dimension
    assert mobilenet_frechet_distance(a, b) == pytest.approx(1 + 4, abs=0.15)
    assert mobilenet_frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_paired_distance() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert mobilenet_paired_distance(a, b).tolist() == pytest.approx([0.0, 1.0])
