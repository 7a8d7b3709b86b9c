"""Other looks of a drawing: what a style word or a colour asks for where no set of icons has it.

The drawing that a bare name means (its house drawing, see icon_captions.py) is also shown as line art, as a
silhouette, in black and white, with outlines and, where one hue rules, in two other colours. A look is one
rule for all drawings, so it can be learned apart from what is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from icon_captions import (
    COLOURS,
    STYLES,
    held_out,
    house_drawings,
    noun_of,
    place_of,
    set_of,
    short_names,
)
from icon_words import with_article
from PIL import Image

Row = dict[str, Any]

STROKES = 90  # half strokes along the longer side of line art
EDGE = 44  # levels by which neighbours differ at an edge
INK = (24, 24, 24)
HUES = {"red": 0.0, "orange": 0.075, "yellow": 0.14, "green": 0.36, "blue": 0.61, "purple": 0.77}
RULES = 0.6  # share of a drawing that has one of these colours, for it to be shown in others
SATURATED = 90  # levels from which a pixel has a hue to speak of
RECOLOURED = 2  # other colours a drawing is shown in


def with_edges(drawing: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The drawing with room for strokes around it, and where its edges are, of colour and of itself (L)."""
    stroke = 2 * round(max(drawing.size) / STROKES) + 1
    margin = stroke + 1
    size = (drawing.width + 2 * margin, drawing.height + 2 * margin)
    wide = Image.new("RGBA", size, (255, 255, 255, 0))
    wide.alpha_composite(drawing, (margin, margin))
    flat = Image.new("RGBA", size, (255, 255, 255, 255))
    flat.alpha_composite(wide)
    planes = np.dstack([np.asarray(flat.convert("RGB")), np.asarray(wide.getchannel("A"))])
    smooth = cv2.medianBlur(planes, 5)
    steps = cv2.morphologyEx(smooth, cv2.MORPH_GRADIENT, np.ones((stroke, stroke), np.uint8))
    return wide, Image.fromarray(255 * (steps.max(axis=2) > EDGE).astype(np.uint8))


def outlined(drawing: Image.Image) -> Image.Image:
    """The drawing with its edges in ink."""
    answer, edges = with_edges(drawing)
    answer.paste((*INK, 255), mask=edges)
    return answer


def line_art(drawing: Image.Image) -> Image.Image:
    """The edges alone in ink, white between them."""
    answer, edges = with_edges(drawing)
    answer.paste((255, 255, 255, 255), mask=answer.getchannel("A"))
    answer.paste((*INK, 255), mask=edges)
    return answer


def silhouette(drawing: Image.Image) -> Image.Image:
    answer = Image.new("RGBA", drawing.size, (*INK, 0))
    answer.putalpha(drawing.getchannel("A"))
    return answer


def black_and_white(drawing: Image.Image) -> Image.Image:
    answer = drawing.convert("L").convert("RGBA")
    answer.putalpha(drawing.getchannel("A"))
    return answer


LOOKS: dict[str, tuple[Callable[[Image.Image], Image.Image], tuple[str, ...]]] = {
    "outlined": (outlined, STYLES["outlined"]),
    "line art": (
        line_art,
        (
            "line art of {}",
            "{}, line art",
            "a line drawing of {}",
            "an outline of {}",
            "{}, black line art style",
        ),
    ),
    "silhouette": (
        silhouette,
        ("a silhouette of {}", "{}, silhouette", "a black silhouette of {}", "the shadow of {}"),
    ),
    "black and white": (
        black_and_white,
        (
            "{} in black and white",
            "a black and white icon of {}",
            "{}, black and white",
            "{}, in shades of gray",
        ),
    ),
}
IN_COLOUR = ("{0}", "{1}", "an icon of {0}", "{0}, icon")


def in_colour(drawing: Image.Image, colour: str) -> Image.Image:
    """The drawing with all its hues turned alike, so that their mean becomes that of `colour`."""
    hue, saturation, value = drawing.convert("RGB").convert("HSV").split()
    alpha = drawing.getchannel("A")
    levels, weight = np.asarray(hue, float), np.asarray(saturation, float) * np.asarray(alpha, float)
    weight *= np.asarray(saturation) > SATURATED
    middle = float(np.angle((np.exp(2j * np.pi * levels / 256) * weight).sum())) / (2 * np.pi)
    turn = round(256 * (HUES[colour] - middle))
    turned = hue.point(lambda level: (level + turn) % 256)
    answer = Image.merge("HSV", (turned, saturation, value)).convert("RGB").convert("RGBA")
    answer.putalpha(alpha)
    return answer


def with_look(drawing: Image.Image, look: str) -> Image.Image:
    """A drawing on nothing (RGBA) in a look of `LOOKS` or in a colour of `HUES`."""
    return in_colour(drawing, look) if look in HUES else LOOKS[look][0](drawing)


def other_looks(rows: Sequence[Row], style_of: dict[str, str], left_out: Iterable[str] = ()) -> list[Row]:
    """Rows of the house drawings once more, each with its "look" and captions that ask for it."""
    by_key = {row["key"]: row for row in rows}
    house = house_drawings(rows, style_of, left_out)
    short = short_names(rows, set(house.values()))
    names = {text.lower() for row in rows for text in (row["name"], row["captions"][1])}
    unheard = held_out(rows, style_of)
    found = []
    for key in sorted(set(house.values())):
        row = by_key[key]
        noun, place = noun_of(row, style_of[set_of(row)]), place_of(row)
        nouns = [noun, *(with_article(word) for word in short.get(key, ()))]
        for look, (_, forms) in LOOKS.items():
            if {(row["name"], look), (row["concept"], look)} & unheard:
                continue
            texts = [form.format(one) + place for form in forms for one in nouns]
            found.append(row | {"key": f"{key}-{look.replace(' ', '-')}", "look": look, "captions": texts})
        bare = nouns[-1].split(" ", 1)[-1]
        for colour in other_colours(row):
            if bare.split()[0] in COLOURS or f"{colour} {bare}" in names:
                continue
            texts = [form.format(with_article(f"{colour} {bare}"), f"{colour} {bare}") for form in IN_COLOUR]
            texts = [text + place for text in (*texts, f"{nouns[-1]} in {colour}")]
            found.append(row | {"key": f"{key}-{colour}", "look": colour, "captions": texts})
    return found


def other_colours(row: Row) -> list[str]:
    """Colours to show a drawing in, seeded by its key; none unless one hue rules it."""
    ruling, share = row["colours"][0]
    if ruling not in HUES or share < RULES:
        return []
    others = [colour for colour in HUES if colour != ruling]
    return random.Random(row["key"]).sample(others, RECOLOURED)
