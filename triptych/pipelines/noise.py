"""Where the randomness of a picture comes from: its own seed, and nothing else.

Every normal draw is a function of (seed, stage, step). It is made on the CPU, whatever computes the rest,
so a picture does not depend on its neighbours in a batch, on their number, on the device's generator, or on
how many draws a sampler asked for before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

START = -1  # the step of the tensor that sampling starts from


def draw(seed: int, stage: str, step: int, shape: Sequence[int]) -> Tensor:
    """Unit normal numbers of `shape`, float32 on the CPU, always the same for the same arguments."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def draw_batch(seeds: Sequence[int], stage: str, step: int, shape: Sequence[int]) -> Tensor:
    """`draw` for every seed, stacked: (len(seeds), *shape)."""
    return torch.stack([draw(seed, stage, step, shape) for seed in seeds])
