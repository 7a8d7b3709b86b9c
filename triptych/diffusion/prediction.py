"""Noising, and the three things a network can be asked to predict: "eps", "v" and "x0".

Training and sampling both go through these few lines, so they cannot drift apart. `logsnr` is one value
per sample, shape (B,), or one value for all, shape (); pictures are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from triptych.diffusion.schedule import alpha_sigma

Prediction = Literal["eps", "v", "x0"]
PREDICTIONS: tuple[Prediction, ...] = ("eps", "v", "x0")

PYRAMID_RATIO = 0.75
PYRAMID_LEVELS = 10  # the full resolution and at most nine coarser ones
PYRAMID_MAX_SIZE = 16  # finer levels are left to the full-resolution noise


def add_noise(x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """x_t = alpha * x0 + sigma * eps [Kingma 2021, eq. 1]. All (B,C,H,W), logsnr (B,) or ()."""
    alpha, sigma = _factors(logsnr, x0)
    return alpha * x0 + sigma * eps


def target(kind: Prediction, x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """What a network of this kind should answer: eps, x0, or v = alpha * eps - sigma * x0
    [Salimans and Ho 2022, appendix D]. Shapes as in `add_noise`."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    _check(kind)
    alpha, sigma = _factors(logsnr, x0)
    return alpha * eps - sigma * x0


def to_x0_eps(kind: Prediction, x: Tensor, predicted: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Split a noisy x (B,C,H,W) into (x0, eps) with a network's answer of the given kind.

    alpha * x0 + sigma * eps gives x again, whatever was predicted.
    """
    alpha, sigma = _factors(logsnr, x)
    if kind == "eps":
        return (x - sigma * predicted) / alpha, predicted
    if kind == "x0":
        return predicted, (x - alpha * predicted) / sigma
    _check(kind)
    norm = alpha**2 + sigma**2  # 1 up to rounding
    x0 = (alpha / norm) * x - (sigma / norm) * predicted
    eps = (sigma / norm) * x + (alpha / norm) * predicted
    return x0, eps


def offset_noise(eps: Tensor, offset: Tensor, weight: float) -> Tensor:
    """Noise whose mean differs by channel: eps (B,C,H,W) + weight * offset (B,C,1,1), both unit normal.

    The sum is the noise and the target. It lets a model learn pictures far from middle brightness.
    """
    return eps + weight * offset if weight > 0 else eps


def pyramid_noise(shape: Sequence[int], normal: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Unit-variance noise with coarse structure, as Stage B was trained on. Returns `shape` (..., H, W).

    `normal(shape)` supplies unit normal draws: the full resolution first, then one square n x n draw per
    level, largest first, n = H // 2^i between 1 and 16. Both sides of a level follow the height, as in
    the published recipe. Works on one sample (C,H,W) as on a batch, and gives the same for the same draws.
    """
    *leading, height, width = shape
    noise = normal((*leading, height, width))
    power = 1.0
    for level in range(1, PYRAMID_LEVELS):
        size = height // 2**level
        if 1 <= size <= PYRAMID_MAX_SIZE:
            weight = PYRAMID_RATIO**level
            coarse = normal((*leading, size, size)).reshape(1, -1, size, size)
            upsampled = F.interpolate(coarse, size=(height, width), mode="nearest")
            noise = noise + weight * upsampled.reshape(noise.shape)
            power += weight**2
        if size <= 1:
            break
    return noise / power**0.5


def _factors(logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(logsnr)
    if logsnr.ndim == 0:  # a zero-dimensional CPU tensor mixes with any device
        return alpha, sigma
    shape = (-1,) + (1,) * (like.ndim - 1)
    return alpha.to(like.device).view(shape), sigma.to(like.device).view(shape)


def _check(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(f'prediction is "{kind}"; known: {", ".join(PREDICTIONS)}')
