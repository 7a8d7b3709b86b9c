"""What makes sampling faster at the same result, each with a switch, and the network's side of guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.diffusion.denoiser import Branch
from triptych.models.scratch import LIMIT, Buffer, Scratch

Answer = Callable[[Tensor, Tensor, slice, Scratch], Tensor]
"""`answer(x, t, rows, scratch)`: the network's prediction for those rows of the conditions, which are all of
the conditional branch, then all of the other. x and t may be shorter: see `StageC.forward`."""


@dataclass(frozen=True)
class Speed:
    """Switches; outputs agree whatever is chosen, to rounding. docs/performance.md says what each does."""

    once: bool = True  # what does not depend on the step is worked out once per picture
    fused: bool = True  # blocks work in place and in spans that stay in the cache
    share: bool = True  # what is equal in both branches of guidance is worked out once
    together: bool = True  # both branches in one batch; one after the other needs half the memory
    kept_bytes: int = LIMIT  # `once` keeps at most this


class Branches:
    """A `Predict` for the denoiser, made of a network's `answer`, for one run of sampling at `times`."""

    def __init__(self, answer: Answer, speed: Speed, times: Sequence[float] = (), reuse: int = 1) -> None:
        self.answer = answer
        self.speed = speed
        self.times = tuple(times)
        self.reuse = reuse  # of the deep levels, see `Scratch`
        self.time: float | None = None
        self._buffer = Buffer()
        self._scratches: dict[tuple[Branch, ...], Scratch] = {}

    def __call__(self, x: Tensor, t: Tensor, branches: Sequence[Branch]) -> Sequence[Tensor]:
        count = len(branches)
        with torch.no_grad():
            if count == 1 or self.speed.together:
                rows = slice(0, count * len(x))
                if not self.speed.share:
                    x, t = torch.cat([x] * count), torch.cat([t] * count)
                return self.answer(x, t, rows, self._scratch(*branches)).float().chunk(count)
            return [
                self.answer(x, t, slice(place * len(x), (place + 1) * len(x)), self._scratch(branch)).float()
                for place, branch in enumerate(branches)
            ]

    def _scratch(self, *branches: Branch) -> Scratch:
        """Each set of branches has conditions of its own, and so results of its own."""
        if branches not in self._scratches:
            speed = self.speed
            self._scratches[branches] = Scratch(
                self.times, speed.once, speed.fused, self._buffer, speed.kept_bytes, self.reuse
            )
        scratch = self._scratches[branches]
        scratch.at(self.time)
        return scratch
