"""How near a picture comes to another, and how much smaller its latents are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from triptych.evaluation.metrics import psnr, ssim
from triptych.images import cover, to_pixels


def fidelity(made: Image.Image, original: Image.Image) -> dict[str, float]:
    """PSNR in decibels and SSIM of a picture against `original`, which is brought to its size."""
    a, b = to_pixels([made]), to_pixels([cover(original, made.size)])
    return {"psnr": float(psnr(a, b)[0]), "ssim": float(ssim(a, b)[0])}


def compression(size: tuple[int, int], latents: Sequence[int]) -> dict[str, float]:
    """How many times fewer numbers latents (1,c,h,w) have than a picture of `size` (width, height), three a
    pixel, and how many times shorter a side is.

    >>> compression((1024, 1024), (1, 16, 24, 24))["per side"]
    42.666666666666664
    """
    width, height = size
    _, channels, rows, columns = latents
    fewer = 3 * width * height / (channels * rows * columns)
    return {"compression": fewer, "per side": math.sqrt(width * height / (rows * columns))}
