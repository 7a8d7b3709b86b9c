"""Random numbers of training, keyed by (seed, step, place in the global batch).

Each sample has its own generator, so what it draws does not depend on how a batch is split over processes
or accumulation steps, nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TRAINING, DROPOUT, CODES = range(3)  # what a key is for


def key(seed: int, purpose: int, *numbers: int) -> int:
    """A 63-bit seed that differs for every combination of its arguments."""
    state = np.random.SeedSequence((seed, purpose, *numbers)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


class Draws:
    """Draws for the samples at `places` of the global batch of one step; all on the CPU."""

    def __init__(self, seed: int, step: int, places: Sequence[int]) -> None:
        self.generators = [
            torch.Generator().manual_seed(key(seed, TRAINING, step, place)) for place in places
        ]

    def __len__(self) -> int:
        return len(self.generators)

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each sample, (B,)."""
        return torch.stack([torch.rand((), generator=generator) for generator in self.generators])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Unit normal draws of `shape` for each sample, (B, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])
