"""Arithmetic between picture sizes and latent grids (the rules of the published model).

The published pipeline divides by the decimal 42.67; that number, and the rule that picture sides are
multiples of 8, live here and nowhere else.
"""

from __future__ import annotations

import math

PIXELS_PER_LATENT_C = 42.67  # 1024 pixels / 24 latents; stage C was trained at 768 pixels = 24 latents of 32
PIXELS_PER_LATENT_B = 4  # stage A is an f4 autoencoder
MAX_ASPECT = 4  # of a picture's sides, for sizes chosen by us
SIDE_MULTIPLE = 8  # stage A divides by 4 and stage B unshuffles its latents by 2


def latent_size_c(height: int, width: int, pixels_per_latent: float = PIXELS_PER_LATENT_C) -> tuple[int, int]:
    """Rows and columns of `latents_c` for a picture of `height` x `width` pixels, rounded up."""
    return math.ceil(height / pixels_per_latent), math.ceil(width / pixels_per_latent)


def latent_size_b(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of `latents_b` for a picture of `height` x `width` pixels, rounded up."""
    return math.ceil(height / PIXELS_PER_LATENT_B), math.ceil(width / PIXELS_PER_LATENT_B)


def nearest_sides(side: int, multiple: int = SIDE_MULTIPLE) -> tuple[int, int]:
    """The reachable sides just below and above `side` (equal when `side` is reachable itself)."""
    below = max(multiple, side // multiple * multiple)
    return below, below if below == side else below + multiple


def is_reachable(height: int, width: int, multiple: int = SIDE_MULTIPLE) -> bool:
    """Whether a picture of this size can be made exactly."""
    return height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0


def fitting_size(
    size: tuple[int, int], default: tuple[int, int], multiple: int = SIDE_MULTIPLE, smallest: int = 0
) -> tuple[int, int]:
    """The size (width, height) to make for a picture of `size`: its own shape, the area of `default`.

    Sides are multiples of `multiple` from `smallest` on. A picture whose own area is between half and twice
    that of `default` keeps it; shapes longer than 1:MAX_ASPECT are cut to that.

    >>> fitting_size((4000, 3000), (256, 256))
    (296, 224)
    """
    width, height = size
    width, height = min(width, height * MAX_ASPECT), min(height, width * MAX_ASPECT)
    ratio = default[0] * default[1] / (width * height)
    scale = 1.0 if 0.5 <= ratio <= 2 else math.sqrt(ratio)
    least = max(multiple, -(-smallest // multiple) * multiple)
    wide, high = (max(least, round(side * scale / multiple) * multiple) for side in (width, height))
    return wide, high
