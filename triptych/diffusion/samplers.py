"""Samplers: generator functions that walk from noise to data and yield every step.

Each takes `denoise(x, logsnr, t) -> (x0, eps, prediction)`, the state x (B,C,H,W), the grid `times` and
`logsnrs` of `Schedule.grid` (both (steps + 1,), noise first) and `noise(index)`, which gives the unit
normal draw of step `index` in the shape of x. A grid that starts below t = 1 continues from a noised
picture; one that ends above t = 0 stops early.

The result of a run is `x0` of its last step, not `x`, which still holds the noise of the grid's end. A
caller may look at a step, replace its `x` before asking for the next, or stop asking:

    for step in sample_ddpm(denoise, x, times, logsnrs, noise):
        show(step.x0)
    result = step.x0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from triptych.diffusion.schedule import alpha_sigma

Denoise = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
Noise = Callable[[int], Tensor]


@dataclass
class Step:
    """One finished step of a sampler. `t` is the grid time where the network was evaluated; x0 and
    prediction belong to that time, x is the state at the next one."""

    index: int
    steps: int
    t: float
    x: Tensor
    x0: Tensor
    prediction: Tensor


class Sampler(Protocol):
    """What every entry of SAMPLERS can be called with."""

    def __call__(
        self, denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise
    ) -> Iterator[Step]: ...


def sample_ddpm(denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise) -> Iterator[Step]:
    """Ancestral sampling [Ho et al. 2020, eq. 6-7], in the form of DDIM with eta = 1."""
    return sample_ddim(denoise, x, times, logsnrs, noise, eta=1.0)


def sample_ddim(
    denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. 2021 (DDIM), eq. 12 and 16: deterministic at eta 0, ancestral at eta 1."""
    for index, t, here, there in _intervals(times, logsnrs):
        x0, eps, prediction = denoise(x, here, t)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(here), alpha_sigma(there)
        next_x = alpha_next * x0
        if eta > 0:
            # Two grid points inside the schedule's clamp are equal, so rounding may dip below zero.
            fresh = (1 - alpha**2 / alpha_next**2).clamp(min=0)
            tau = eta * (sigma_next**2 / sigma**2).sqrt() * fresh.sqrt()
            next_x = next_x + (sigma_next**2 - tau**2).clamp(min=0).sqrt() * eps + tau * noise(index)
        else:
            next_x = next_x + sigma_next * eps
        step = Step(index, len(times) - 1, t, next_x, x0, prediction)
        yield step
        x = step.x


def sample_euler(denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE d(x/alpha) = eps d(sigma/alpha) [Karras et al. 2022,
    eq. 4 and section 3; Song et al. 2021, eq. 14]. No noise is drawn.

    In exact arithmetic this is DDIM at eta 0; it is the plain first-order reference for the others.
    """
    for index, t, here, there in _intervals(times, logsnrs):
        x0, eps, prediction = denoise(x, here, t)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(here), alpha_sigma(there)
        scaled = x / alpha + (sigma_next / alpha_next - sigma / alpha) * eps
        step = Step(index, len(times) - 1, t, alpha_next * scaled, x0, prediction)
        yield step
        x = step.x


def sample_dpmpp_2m(
    denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise
) -> Iterator[Step]:
    """DPM-Solver++(2M) [Lu et al. 2022, algorithm 2]: second order from the last two x0. No noise is drawn.

    The first step is of first order, which costs no order overall.
    """
    previous: tuple[Tensor, Tensor] | None = None  # x0 of the last step and its logsnr
    for index, t, here, there in _intervals(times, logsnrs):
        x0, _, prediction = denoise(x, here, t)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(here), alpha_sigma(there)
        estimate = x0
        if previous is not None and float(here) != float(previous[1]):
            # Extrapolate x0, linear in logsnr, to the middle of this step. A previous step inside the
            # schedule's clamp has no width and says nothing about the slope.
            estimate = x0 + (there - here) / (2 * (here - previous[1])) * (x0 - previous[0])
        next_x = (sigma_next / sigma) * (x - alpha * estimate) + alpha_next * estimate
        previous = (x0, here)
        step = Step(index, len(times) - 1, t, next_x, x0, prediction)
        yield step
        x = step.x


def sample_lcm(denoise: Denoise, x: Tensor, times: Tensor, logsnrs: Tensor, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling [Luo et al. 2023, algorithm 3]: jump to x0, then noise it afresh.

    For networks distilled into consistency models; one step is then enough.
    """
    for index, t, here, there in _intervals(times, logsnrs):
        x0, _, prediction = denoise(x, here, t)
        alpha_next, sigma_next = alpha_sigma(there)
        step = Step(index, len(times) - 1, t, alpha_next * x0 + sigma_next * noise(index), x0, prediction)
        yield step
        x = step.x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "euler": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
    "lcm": sample_lcm,
}


def _intervals(times: Tensor, logsnrs: Tensor) -> Iterator[tuple[int, float, Tensor, Tensor]]:
    """(index, t, logsnr here, logsnr there) of every step; levels stay on the CPU, where reading them
    never waits for an accelerator, and mix with tensors of any device."""
    if times.ndim != 1 or times.shape != logsnrs.shape or len(times) < 2:
        raise ValueError(
            f"times {tuple(times.shape)} and logsnrs {tuple(logsnrs.shape)} must be one line of the same "
            "length, at least 2"
        )
    levels = logsnrs.to(torch.device("cpu"))
    for index, t in enumerate(times[:-1].tolist()):
        yield index, t, levels[index], levels[index + 1]
