"""Which caption of a picture is told, and in which order its tags stand.

All choices follow from draws that are given, so a run can name any caption it told.
"""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = ","


def caption_number(count: int, u: float, main_share: float = 0.5) -> int:
    """Which of `count` captions is told: the first with probability `main_share`, else one of the others; -1
    when there is none. `u` is a draw in [0, 1)."""
    if count == 0:
        return -1
    if count == 1 or u < main_share:
        return 0
    return 1 + int((u - main_share) / (1 - main_share) * (count - 1))


def count_tags(caption: str) -> int:
    """How many tags, separated by commas, a caption has."""
    return caption.count(SEPARATOR) + 1


def rearrange(
    caption: str, u: Sequence[float], *, shuffle: bool = True, keep: int = 0, drop: float = 0.0
) -> str:
    """A caption of tags with some left out (a share `drop`) and the rest in another order.

    The first `keep` tags stay, and stay first. `u` are draws in [0, 1), two for every tag. A caption never
    loses all of its tags.

    >>> rearrange("zorb, teal, one eye, feet", [0.9, 0.8, 0.2, 0.1] * 2, keep=1)
    'zorb, feet, one eye, teal'
    """
    tags = [tag.strip() for tag in caption.split(SEPARATOR)]
    order, fate = u[: len(tags)], u[len(tags) : 2 * len(tags)]
    loose = [number for number in range(keep, len(tags)) if fate[number] >= drop]
    if shuffle:
        loose.sort(key=lambda number: order[number])
    chosen = [*range(min(keep, len(tags))), *loose] or [0]
    return f"{SEPARATOR} ".join(tags[number] for number in chosen)
