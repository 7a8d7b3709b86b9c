"""What makes sampling faster at the same result, each with a switch, and the network's side of guidance."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from triptych.checkpoints.hub import cache_folder
from triptych.diffusion.denoiser import Branch
from triptych.errors import RequestError
from triptych.models.scratch import LIMIT, Buffer, Scratch

COMPILED = "triptych-compiled"  # a folder

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
    compiled: bool = False  # blocks run under torch.compile, but those that are fused on a CPU
    kept_bytes: int = LIMIT  # `once` keeps at most this

    def ready(self, device: torch.device) -> Speed:
        """These switches, once it is sure that they work on `device`. Raises RequestError without a compiler.

        What torch.compile makes is stored beside the files of the hub, unless TORCHINDUCTOR_CACHE_DIR says
        another folder, and found there by later processes.
        """
        if self.compiled:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / COMPILED))
            missing = missing_compiler(device)
            if missing:
                raise RequestError(
                    f"Compiling needs {missing}, which is not here: install it, or do without."
                )
        return self


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would need for `device` and does not find."""
    if device.type == "cuda":
        return None if find_spec("triton") else "Triton"
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:  # InvalidCxxCompiler is one
        return "a C++ compiler"
    return None


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
                self.times,
                speed.once,
                speed.fused,
                self._buffer,
                speed.kept_bytes,
                self.reuse,
                speed.compiled,
            )
        scratch = self._scratches[branches]
        scratch.at(self.time)
        return scratch
