"""From a network to a denoiser: tell it the time, guide it, split its answer into x0 and eps.

The network is any callable, so this file knows nothing of prompts, batches or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triptych.diffusion.prediction import Prediction, to_x0_eps
from triptych.diffusion.schedule import Schedule

Branch = Literal["cond", "uncond"]

Predict = Callable[[Tensor, Tensor, Sequence[Branch]], Sequence[Tensor]]
"""`predict(x, t, branches)`: x (B,C,H,W) and t (B,) float32 on x's device, answered with one prediction
(B,C,H,W) per branch, in order. `branches` is ("cond",) or ("cond", "uncond"); whether two branches run as
one batch of 2B or one after the other is the callable's choice."""

COND_ONLY: tuple[Branch, ...] = ("cond",)
BOTH: tuple[Branch, ...] = ("cond", "uncond")

# Grid times are float32: 0.8 on the grid is a little above the 0.8 that someone wrote as an interval's end.
_T_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance [Ho and Salimans 2022, eq. 6].

    weight     1 is the plain conditional prediction; a pair (at noise, at data) is mixed linearly in t
    rescale    0 to 1: how far the deviation of each image is pulled back to the conditional one's
    interval   (low, high) of grid t within which guidance acts; outside, only the conditional branch runs
               [Kynkaanniemi et al. 2024, eq. 5]
    agreement  an image whose branches differ by less than this, relative to the conditional one, is not
               guided any more [Castillo et al. 2023, adaptive guidance]; 0 never stops
    """

    weight: float | tuple[float, float] = 4.0
    rescale: float = 0.7
    interval: tuple[float, float] = (0.0, 1.0)
    agreement: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}; it must be between 0 and 1")
        low, high = self.interval
        if low > high:
            raise ValueError(f"guidance interval is {self.interval}; the lower end comes first")
        if not self.agreement >= 0:
            raise ValueError(f"guidance agreement is {self.agreement}; it cannot be negative")

    def weight_at(self, t: float) -> float:
        """The weight at grid time t; 1 outside the interval."""
        low, high = self.interval
        if not low - _T_TOLERANCE <= t <= high + _T_TOLERANCE:
            return 1.0
        if isinstance(self.weight, tuple):
            at_noise, at_data = self.weight
            return at_noise * t + at_data * (1 - t)
        return self.weight


def guide(cond: Tensor, uncond: Tensor, weight: float, rescale: float = 0.0) -> Tensor:
    """Push the conditional prediction away from the unconditional one. All (B,C,H,W).

    p = uncond + weight * (cond - uncond), then p <- rescale * p * std(cond) / std(p) + (1 - rescale) * p
    [Lin et al. 2023, eq. 15-16]. Deviations are taken per image, so an image does not depend on the
    others of its batch.
    """
    guided = torch.lerp(uncond, cond, weight)
    if rescale == 0:
        return guided
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(dim=axes, keepdim=True) / (guided.std(dim=axes, keepdim=True) + 1e-9)
    return rescale * (guided * ratio) + (1 - rescale) * guided


def difference(cond: Tensor, uncond: Tensor) -> Tensor:
    """|cond - uncond| / |cond| of each image, both (B,C,H,W) -> (B,)."""
    return (cond - uncond).flatten(1).norm(dim=1) / cond.flatten(1).norm(dim=1).clamp(min=1e-12)


class Denoised(NamedTuple):
    """One evaluation: the clean estimate, the noise estimate, and the prediction they came from."""

    x0: Tensor
    eps: Tensor
    prediction: Tensor


@dataclass
class Denoiser:
    """`denoise(x, logsnr, t)` for the samplers, made of a network.

    `prediction` says what the network was trained to answer. `guidance` None, or weight 1, runs only the
    conditional branch. Fields may be changed between the steps of a sampler; one denoiser serves one run,
    because it remembers which images need no guidance any more.
    """

    predict: Predict
    schedule: Schedule
    prediction: Prediction = "eps"
    guidance: Guidance | None = None
    _agreed: Tensor | None = field(default=None, init=False, repr=False)  # (B,) images no longer guided

    def __call__(self, x: Tensor, logsnr: Tensor, t: float) -> Denoised:
        """Evaluate at x (B,C,H,W), noise level logsnr () and grid time t; the state stays in x's dtype."""
        time = self.schedule.time(logsnr).to(x.device).expand(x.shape[0])
        weight = 1.0 if self.guidance is None else self.guidance.weight_at(t)
        if self.guidance is None or weight == 1 or (self._agreed is not None and bool(self._agreed.all())):
            (predicted,) = self.predict(x, time, COND_ONLY)
            predicted = predicted.to(x.dtype)
        else:
            cond, uncond = self.predict(x, time, BOTH)
            # In the state's precision: guidance takes the difference of two nearly equal tensors.
            cond, uncond = cond.to(x.dtype), uncond.to(x.dtype)
            predicted = guide(cond, uncond, weight, self.guidance.rescale)
            if self.guidance.agreement > 0:
                predicted = self._until_agreed(cond, uncond, predicted, self.guidance.agreement)
        x0, eps = to_x0_eps(self.prediction, x, predicted, logsnr)
        return Denoised(x0, eps, predicted)

    def _until_agreed(self, cond: Tensor, uncond: Tensor, guided: Tensor, agreement: float) -> Tensor:
        """Guided where branches have differed so far. Every image decides for itself, so that it does not
        depend on its batch; the second branch is saved once all have agreed."""
        agreed = self._agreed
        if agreed is None:
            agreed = torch.zeros(len(cond), dtype=torch.bool, device=cond.device)
        self._agreed = agreed | (difference(cond, uncond) < agreement)
        return torch.where(agreed.view(-1, 1, 1, 1), cond, guided)


def hold(found: Denoised, x: Tensor, logsnr: Tensor, known: Tensor, drawn: Tensor) -> Denoised:
    """The clean estimate is `known` (B,C,H,W) where `drawn` (B,1,H,W) is 0 and the network's where it is 1.

    The noise estimate follows, so that whatever the sampler, x outside ends as `known` and inside is drawn
    beside it [Wang 2023, DDNM, eq. 13; a mask is its A]. Shapes as in `Denoiser`.
    """
    x0, eps = to_x0_eps("x0", x, torch.lerp(known, found.x0, drawn), logsnr)
    return Denoised(x0, eps, found.prediction)
