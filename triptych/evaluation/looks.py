"""Whether a picture has the look that its words ask for, from its pixels alone: line art, a silhouette, black
and white, or one colour.

What is drawn is what differs from the border's colour. Line art is colourless and mostly holes, a
silhouette dark and full, black and white colourless and neither of those; a colour is there when enough of
what is drawn has its hue. What the thing is does not matter here. Needs scipy (the `eval` extra).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from triptych.errors import MissingExtra

if TYPE_CHECKING:
    from triptych.evaluation.evaluate import Progress, Report
    from triptych.pipelines.cascade import Cascade

SIDE = 256  # pictures are brought to this; a stroke is a few pixels of it
DRAWN = 48  # levels by which a pixel differs from the border's colour in some channel
LEAST_DRAWN = 0.01  # of the picture
# Levels between the channels of what is drawn, on average. The decoder of mini makes at most 24 of grey
# drawings; three in four coloured drawings have over 70.
COLOURLESS = 40
GAP = 15  # pixels by which a line may be interrupted and still enclose something
HOLES = 0.3  # least share of holes in line art
COLOURED = 60  # levels between the channels of a pixel that has a hue
DARK = 100  # levels of lightness of ink
MOSTLY = 0.85  # of a silhouette: dark, and no hole
HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 125, "blue": 218, "purple": 280}  # degrees
LEAST_OF_HUE = 0.4  # of what is drawn

THINGS = (
    "a basket", "a bed", "a bell pepper", "a brain", "a bucket", "a coat", "a goat", "a kite", "a mosque",
    "a pencil", "a pineapple", "a satellite", "a seal", "a ship", "a t-shirt", "a telephone", "a toilet",
    "a volcano", "a tangerine", "a fairy",
)  # fmt: skip
# Each look asked for in words of its own, so that no prompt is a caption of the icon set's.
ASKED = {
    "line art": "{} drawn in line art",
    "silhouette": "{} shown as a silhouette",
    "black and white": "a picture of {} in black and white",
    "purple": "{} coloured purple",
    "green": "{} coloured green",
    "blue": "{} coloured blue",
}


def has_look(image: Image.Image, look: str) -> bool:
    """Whether a picture has a look of `ASKED`, or a colour of `HUES`."""
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "eval", "Judging looks") from None

    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    rgb = np.asarray(small, dtype=np.int16)
    border = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    drawn = np.abs(rgb - border).max(axis=2) > DRAWN
    if drawn.mean() < LEAST_DRAWN:
        return False
    pixels = rgb[drawn]
    chroma = np.ptp(pixels, axis=1)
    if look in HUES:
        hue = np.asarray(small.convert("HSV"), dtype=float)[..., 0][drawn] * 360 / 256
        apart = {name: np.abs((hue - degrees + 180) % 360 - 180) for name, degrees in HUES.items()}
        nearest = np.stack(list(apart.values())).argmin(axis=0) == list(HUES).index(look)
        return bool((nearest & (chroma > COLOURED)).mean() >= LEAST_OF_HUE)
    if chroma.mean() > COLOURLESS:
        return False
    closed = ndimage.binary_closing(np.pad(drawn, GAP), np.ones((GAP, GAP)))
    full = float(drawn.sum() / ndimage.binary_fill_holes(closed).sum())
    if full < 1 - HOLES:
        return look == "line art"
    dark = float((pixels.mean(axis=1) < DARK).mean())
    if dark > MOSTLY and full > MOSTLY:
        return look == "silhouette"
    return look == "black and white"


def evaluate_looks(
    cascade: Cascade,
    seeds: Sequence[int] = (0,),
    count: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Draw twenty things (or `count`) in each look of `ASKED`; the share that has it, by look and of all, and
    how many of the same things have it unasked."""
    from triptych.evaluation.evaluate import Report, make_pictures, share

    things = THINGS[:count]
    asked = [(thing, look) for look in ASKED for thing in things]
    prompts = [*(ASKED[look].format(thing) for thing, look in asked), *things]
    images, drawn, used = make_pictures(cascade, prompts, seeds, progress, **settings)
    rows: list[dict[str, Any]] = []
    unasked: list[dict[str, Any]] = []
    shown: list[Image.Image] = []
    for number, (image, seed) in enumerate(zip(images, drawn, strict=True)):
        place = number % len(prompts)
        if place < len(asked):
            look = asked[place][1]
            shown.append(image)
            rows.append(
                {"prompt": prompts[place], "seed": seed, "look": look, "right": has_look(image, look)}
            )
        else:
            unasked += [{"right": has_look(image, look)} for look in ASKED]
    measures = {"right": share(rows, "right"), "unasked": share(unasked, "right")}
    for look in ASKED:
        measures[look] = share([row for row in rows if row["look"] == look], "right")
    return Report("looks", measures, rows, used, shown)
