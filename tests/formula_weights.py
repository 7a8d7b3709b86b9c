"""Weights by formula: both sides of a comparison fill their networks alike, and none has to be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

NARROW, WIDE = (-0.1, 0.1), (0.5, 1.5)


def weights_by_formula(shapes: Mapping[str, Sequence[int]], seed: int = 2015) -> dict[str, torch.Tensor]:
    """Tensors of these names and shapes from one generator, in the order of the sorted names.

    Convolutions and matrices keep the spread of what goes through them [He 2015]; the scales and variances of
    normalisations are about 1, means and biases about 0. Uniform numbers, which every machine draws alike.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        inputs = torch.Size(shape[1:]).numel()
        low, high = WIDE if name.endswith(("bn.weight", "running_var")) else NARROW
        if len(shape) > 1:
            high = (6 / inputs) ** 0.5
            low = -high
        found[name] = low + (high - low) * torch.rand(shape, generator=generator)
    return found
