"""The cosine noise schedule: time t in [0, 1] <-> log signal-to-noise ratio, step grids, training times.

t = 1 is noise and t = 0 is data. Everything downstream speaks in `logsnr` = ln(alpha^2 / sigma^2). The
curve is the cosine of Nichol and Dhariwal 2021 (eq. 17), clamped like the official Stable Cascade code;
the shift moves it for larger pictures (Hoogeboom et al. 2023, simple diffusion, eq. 3). The released
weights depend on the order of the clamps and on float32 rounding near them, so both are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OFFSET = 0.008  # s in the paper: keeps the noise near t = 0 from vanishing
VARIANCE_MIN, VARIANCE_MAX = 0.0001, 0.9999  # bounds of alpha^2 before the shift
TRAINING_T_MIN = 0.001


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x_t = alpha * x0 + sigma * eps, for any shape of logsnr.

    Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = 1 - alpha^2. At least float32: bfloat16
    has no room for 1 - 0.9999.
    """
    alpha_squared = torch.sigmoid(_at_least_float32(logsnr))
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def training_times(uniform: Tensor) -> Tensor:
    """Training times in [0.001, 1] from uniform draws in [0, 1), any shape."""
    return ((1 - uniform) + TRAINING_T_MIN).clamp(TRAINING_T_MIN, 1.0)


@dataclass(frozen=True)
class Schedule:
    """The cosine schedule. `shift` > 1 spends more of t on high noise; the published Stage C samples
    with 2, Stage B with 1, and both were trained with 1."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift is {self.shift}; it must be a positive number, usually 1 or 2")

    def logsnr(self, t: Tensor) -> Tensor:
        """ln(SNR) at times t (any shape, clamped to [0, 1]), float32, within about [-9.2102, 9.2101].

        The limits are the unshifted ends, applied after the shift: with shift 2 some noise is left at
        t = 0 (7.8238), and the low end stays at -9.2102.
        """
        logsnr = _unshifted_logsnr(t)
        if self.shift != 1:
            logsnr = logsnr - 2 * math.log(self.shift)
        low, high = _LIMITS
        return logsnr.clamp(low, high)

    def time(self, logsnr: Tensor) -> Tensor:
        """The time t' in [0, 1] that the network is told at this logsnr (any shape), float32.

        It is the inverse of the unshifted curve, so it says how much noise there is and not where on the
        grid the sampler stands: 0.99358 at the start of sampling, whatever the shift.
        """
        alpha_squared = torch.sigmoid(logsnr.float()).clamp(0.0, 1.0)
        angle = torch.arccos((alpha_squared * NORMALISER).sqrt())
        return (angle / (math.pi * 0.5) * (1 + OFFSET) - OFFSET).clamp(0.0, 1.0)

    def grid(self, steps: int, start: float = 1.0, end: float = 0.0) -> tuple[Tensor, Tensor]:
        """Times and logsnr of a sampling run: two float32 CPU tensors (steps + 1,), noise first.

        `start` < 1 begins from a noised picture instead of noise; `end` > 0 stops early. Raises
        ValueError unless steps >= 1 and 0 <= end < start <= 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least one step is needed")
        if not 0 <= end < start <= 1:
            raise ValueError(f"sampling from t = {start} to t = {end}; it must be 0 <= end < start <= 1")
        t = torch.linspace(start, end, steps + 1, dtype=torch.float32, device="cpu")
        return t, self.logsnr(t)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _unshifted_logsnr(t: Tensor) -> Tensor:
    # The cosine is clamped before it is squared: at t = 1 rounding can leave it just below zero.
    t = t.float().clamp(0.0, 1.0)
    cosine = torch.cos((OFFSET + t) / (1 + OFFSET) * math.pi * 0.5).clamp(0.0, 1.0)
    alpha_squared = (cosine**2 / NORMALISER).clamp(VARIANCE_MIN, VARIANCE_MAX)
    return torch.log(alpha_squared / (1 - alpha_squared))


# Plain floats holding float32 values, always worked out on the CPU, so that every device and every
# default dtype sees the same numbers. The first makes alpha^2 = 1 at t = 0.
NORMALISER = float(
    torch.cos(torch.tensor(OFFSET / (1 + OFFSET) * math.pi * 0.5, dtype=torch.float32, device="cpu")) ** 2
)
_LOW, _HIGH = _unshifted_logsnr(torch.tensor([1.0, 0.0], dtype=torch.float32, device="cpu")).tolist()
_LIMITS: tuple[float, float] = (_LOW, _HIGH)
