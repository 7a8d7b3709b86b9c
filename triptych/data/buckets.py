"""Aspect buckets: which canvas a picture is trained on, and how it is resized and cropped to it.

Arithmetic only, after the published trainer: every ratio gets the largest
canvas of about `size` x `size` pixels whose sides are multiples of `factor`; a picture goes to the canvas of
the nearest ratio, is resized until it covers it, and cropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from triptych.errors import SettingsError

RATIOS = (1 / 1, 1 / 2, 1 / 3, 2 / 3, 3 / 4, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1 / 6, 5 / 6, 9 / 16)
FACTOR = 32  # canvas sides are multiples of this
RANDOM_SHARE = 0.05  # of the pictures that go to any bucket, whatever their shape


@dataclass(frozen=True)
class Bucket:
    """One canvas, in pixels, and the ratio width / height it stands for (before rounding its sides)."""

    height: int
    width: int
    ratio: float


def make_buckets(size: int, ratios: Sequence[float] = RATIOS, factor: int = FACTOR) -> list[Bucket]:
    """The canvases for pictures of about `size` x `size`; ratios below 1 also stand for their inverse.

    >>> make_buckets(768)[1]
    Bucket(height=1056, width=512, ratio=0.5)
    """
    buckets = []
    for ratio in (*ratios, *(1 / r for r in ratios if r < 1)):
        height = int(math.sqrt(size**2 / ratio) // factor) * factor
        width = int(math.sqrt(size**2 * ratio) // factor) * factor
        if min(height, width) < factor:
            raise SettingsError(
                f"A ratio of {ratio:.3g} leaves no room at size {size} with sides in steps of {factor}: "
                "use a larger size, a smaller step or milder ratios."
            )
        buckets.append(Bucket(height, width, ratio))
    return buckets


def buckets_of(sizes: Iterable[tuple[int, int]]) -> list[Bucket]:
    """Buckets from canvases given as (height, width)."""
    return [Bucket(height, width, width / height) for height, width in sizes]


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> int:
    """The index of the bucket with the nearest ratio; among like ones the nearest in size, then the first."""
    ratio = width / height

    def distance(index: int) -> tuple[float, int]:
        bucket = buckets[index]
        return abs(bucket.ratio - ratio), abs(bucket.height * bucket.width - height * width)

    return min(range(len(buckets)), key=distance)


def shorter_side(height: int, width: int, bucket: Bucket) -> int:
    """The length the picture's shorter side is resized to, so that the canvas fits inside."""
    long, short = max(height, width), min(height, width)
    canvas_long, canvas_short = max(bucket.height, bucket.width), min(bucket.height, bucket.width)
    if (bucket.width / bucket.height - 1) * (width / height - 1) >= 0:  # both wide, or both tall
        return max(math.ceil(canvas_long * short / long), canvas_short)
    return max(math.ceil(canvas_short * long / short), canvas_long)


def covering_size(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """Height and width after resizing, both at least those of the canvas."""
    short = shorter_side(height, width, bucket)
    if height <= width:
        resized = short, int(short * width / height)
    else:
        resized = int(short * height / width), short
    # The truncated side may come out one short of the canvas by rounding.
    return max(resized[0], bucket.height), max(resized[1], bucket.width)


def crop_corner(
    resized: tuple[int, int], bucket: Bucket, at: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int]:
    """Top and left of the crop. `at` is two uniform draws in [0, 1) for a random crop, or 0.5, 0.5
    (centre)."""
    free_rows, free_columns = resized[0] - bucket.height, resized[1] - bucket.width
    return int(at[0] * (free_rows + 1)), int(at[1] * (free_columns + 1))


def crop_around(resized: tuple[int, int], bucket: Bucket, focus: tuple[float, float]) -> tuple[float, float]:
    """What to tell `crop_corner` for the crop whose middle is as near to `focus` (down, across, in [0, 1] of
    the picture) as its borders let it; 0.5, 0.5 gives the centre crop."""
    places = []
    for side, crop, at in zip(resized, (bucket.height, bucket.width), focus, strict=True):
        free = side - crop
        corner = int(min(max(at * side - crop / 2, 0.0), free))
        places.append(0.5 if at == 0.5 else (corner + 0.5) / (free + 1))
    return places[0], places[1]
