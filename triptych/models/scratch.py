"""What a sampling run hands to a network: results that hold for all of its steps, and memory to work in.

Networks keep nothing themselves. A `Scratch` belongs to one run on one set of conditions; a second run, or
other conditions, take a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

LIMIT = 256 * 2**20  # bytes kept at most; what finds no room is computed anew at every step
SPAN_BYTES = 4 * 2**20  # of the widest map, per thread: stays in the cache between two operations
SPAN_BYTES_ACCELERATOR = 256 * 2**20


class Buffer:
    """Memory for one wide map at a time, used again and again.

    On a CPU, large tensors get fresh pages from the system each time, which costs more than an activation
    function does; accelerators keep their memory themselves.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Uninitialised (rows, width), dtype and device of `like`; what was taken before is overwritten."""
        if like.device.type != "cpu":
            return like.new_empty(rows, width)
        held = self._memory
        if held is None or held.dtype != like.dtype or held.numel() < rows * width:
            self._memory = held = None  # before the new one is there
            self._memory = held = like.new_empty(rows * width)
        return held[: rows * width].view(rows, width)


class Scratch:
    """Results kept between steps, by the module that made them, and a buffer.

    times    the times that the network will be told, one per step: what time blocks make of all of them is
             computed together. Set `row` to the index of the coming step, or to None for any other time
    once     keep results that do not depend on the step
    fused    blocks may overwrite maps and work through them in spans, where no gradient is needed
    reuse    work out the deep levels of a trunk only at every so many-th call, and let the calls between
             take what they gave [Ma et al. 2023, DeepCache]; 1 works them out always. Other results!
    compiled blocks run under torch.compile, where no gradient is needed, but those that are `fused` on a CPU
    """

    def __init__(
        self,
        times: Sequence[float] = (),
        once: bool = True,
        fused: bool = True,
        buffer: Buffer | None = None,
        limit: int = LIMIT,
        reuse: int = 1,
        compiled: bool = False,
    ) -> None:
        self.times = tuple(times) if once else ()
        self.row: int | None = None
        self.once = once
        self.buffer = buffer or Buffer()
        self.limit = limit
        self.used = 0
        self.reuse = reuse
        self._deep: Tensor | None = None
        self._calls = 0  # since the deep levels ran
        self._fused = fused
        self._compiled = compiled
        self._kept: dict[tuple[Hashable, int], Tensor] = {}

    @property
    def fused(self) -> bool:
        return self._fused and not torch.is_grad_enabled()

    @property
    def compiled(self) -> bool:
        return self._compiled and not torch.is_grad_enabled()

    def in_spans(self, x: Tensor) -> bool:
        """Does a perceptron on x work in place and in spans? On a CPU it does also where blocks are compiled:
        inductor's GELU and sum of squares take longer than the spans do (docs/performance.md)."""
        return self.fused and (x.device.type == "cpu" or not self.compiled)

    def at(self, time: float | None) -> None:
        """The next step is told `time`; None where nobody knows."""
        self.row = None if time is None or time not in self.times else self.times.index(time)

    def keep(self, owner: Hashable, rows: int, make: Callable[[], Tensor]) -> Tensor:
        """What `make()` gave before for `owner` and a batch of `rows`, or gives now."""
        if (owner, rows) in self._kept:
            return self._kept[owner, rows]
        made = make()
        size = made.numel() * made.element_size()
        if self.once and self.used + size <= self.limit:
            self.used += size
            self._kept[owner, rows] = made
        return made

    def deep(self, make: Callable[[], Tensor]) -> Tensor:
        """What the deep levels gave at the last of every `reuse` calls, or give now; not to be changed."""
        if self.reuse == 1:
            return make()
        if self._deep is None or self._calls == self.reuse:
            self._deep, self._calls = make(), 0
        self._calls += 1
        return self._deep


def keep(scratch: Scratch | None, owner: Hashable, rows: int, make: Callable[[], Tensor]) -> Tensor:
    """`Scratch.keep`, or simply `make()` without a scratch."""
    return make() if scratch is None else scratch.keep(owner, rows, make)


def scratch_for(scratch: Scratch | None) -> Scratch | None:
    """The caller's scratch; without one, a fresh one for this call where no gradient is needed."""
    return scratch if scratch is not None or torch.is_grad_enabled() else Scratch(once=False)


def span_rows(width: int, like: Tensor) -> int:
    """How many rows of `width` numbers to work through at a time."""
    on_cpu = like.device.type == "cpu"
    size = SPAN_BYTES * torch.get_num_threads() if on_cpu else SPAN_BYTES_ACCELERATOR
    return max(1, size // (width * like.element_size()))


def spread(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) repeated up to `rows`, a multiple of B: branches of guidance that were equal now part."""
    return x if len(x) >= rows else torch.cat([x] * (rows // len(x)))
