"""What the drawings of the icon set are called while Stage C learns.

Four rules on top of the catalogue's captions (docs/mini.md tells what they bring):

House style. A name without a style ("a tennis ball") belongs to one drawing of that name, the first of
`HOUSE` that has it, on white if one is. Every other drawing says its style each time. Otherwise a name is an
average of a dozen drawings.

Prototypes. Every drawing names that one as its prototype, which the guess of Stage C learns in its place. It
is also shown again, told what others of the name are called, once for every three of them on the same
background, so that it is at home in all styles.

Other words. That drawing is also told without its name, by what a dictionary says it means, by keywords, by
its kind and colour (icon_words.py).

Stand-ins. A drawing is also told in the styles it looks most like, for want of a nearer one: the smooth
gradient bell pepper is "a bell pepper, 3d render style" too. So a style that a thing was never drawn in
gives one of its drawings, not a mixture. Pairs of name and style that are held out for validation are never
told.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from icon_words import other_words, with_article

STYLES = {
    "flat": ("a flat icon of {}", "{}, flat icon style"),
    "bright flat": ("a bright flat icon of {}", "{}, bright flat icon style"),
    "classic flat": ("a classic flat icon of {}", "{}, classic flat icon style"),
    "simple flat": ("a simple flat icon of {}", "{}, simple flat icon style"),
    "detailed flat": ("a detailed flat icon of {}", "{}, detailed flat icon style"),
    "muted flat": ("a muted flat icon of {}", "{}, muted flat icon style"),
    "shaded": ("a shaded icon of {}", "{}, shaded icon style"),
    "outlined": ("an outlined icon of {}", "{}, outlined icon style"),
    "gradient": ("a smooth gradient icon of {}", "{}, smooth gradient style"),
    "cartoon": ("an outlined cartoon of {}", "{}, outlined cartoon style"),
    "3d": ("a 3d render of {}", "{}, 3d render style"),
}
STYLED = re.compile(r"flat icon|shaded icon|outlined icon|gradient|cartoon|3d render")
HOUSE = (
    "flat",
    "bright flat",
    "gradient",
    "shaded",
    "classic flat",
    "detailed flat",
    "simple flat",
    "3d",
    "cartoon",
)
# The styles each style looks most like, by the mean squared difference of semantic latents of drawings with
# one name; behind them come those of HOUSE.
ALIKE = {
    "flat": ("3d", "shaded", "gradient", "simple flat"),
    "bright flat": ("3d", "gradient", "shaded", "flat"),
    "classic flat": ("shaded", "flat", "gradient", "3d"),
    "simple flat": ("flat", "shaded", "detailed flat", "3d"),
    "detailed flat": ("gradient", "flat", "simple flat", "3d"),
    "shaded": ("flat", "3d", "gradient", "bright flat"),
    "gradient": ("3d", "bright flat", "flat", "shaded"),
    "cartoon": ("simple flat", "gradient", "3d", "flat"),
    "3d": ("gradient", "bright flat", "flat", "shaded"),
}
MADE = {"outlined"}  # no set that is trained on has it; icon_looks.py makes it
BACKGROUND = re.compile(r" on an? [a-z ]*background$")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
SHARED_BY = 3  # drawings whose captions one more showing of the house drawing takes
DRAWN_SHAPES = ("circle", "square")  # words of the drawn shapes
MAIN = 4  # of the catalogue's captions: main, bare name, with style and background, by colour or synonym

Row = dict[str, Any]


def retell(
    rows: Sequence[Row], style_of: dict[str, str], left_out: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Captions by key for rows of the catalogue that are trained on; validation rows keep theirs.

    `style_of` gives the style of a set of drawings (the part of a key before "_"); drawings of the sets in
    `left_out` say their own style and stand in for nothing.
    """
    told = [row for row in rows if row["shard"] != "val"]
    by_name = drawings_by_name(rows, style_of, left_out)
    house = {house_drawing(drawings) for drawings in by_name.values()}
    short = short_names(rows, house)
    words = other_words(row for row in told if row["key"] in house)
    stands_in = stand_ins(by_name, held_out(rows, style_of))
    captions = {}
    for number, row in enumerate(told):
        style, key = style_of[set_of(row)], row["key"]
        noun, place = noun_of(row, style), place_of(row)
        found = list(row["captions"][:MAIN])
        if key in house:
            found.append(f"{noun}{place}")
            found += [with_article(word) + place for word in short.get(key, ())]
            found += [text + place for text in words[key]]
        else:
            found = [text if k > 1 else with_style(text, style) for k, text in enumerate(found)]
            found.append(with_style(f"{noun}{place}", style))
        for turn, other in enumerate(stands_in.get(key, ()), number):
            form = STYLES[other][turn % 2]
            found.append(form.format(noun) + place if turn % 2 == 0 else form.format(f"{noun}{place}"))
        captions[key] = list(dict.fromkeys(found))
    return captions


def shown_again(rows: Sequence[Row], told: dict[str, list[str]], house: dict[str, str]) -> list[Row]:
    """Rows of the drawings that bare names mean, once more, with what `told` calls others of the name."""
    by_key = {row["key"]: row for row in rows}
    others: dict[str, list[str]] = defaultdict(list)
    for key in told:
        row = by_key[key]
        shown = house.get(row["name"], key)
        if shown != key and by_key[shown]["background"] == row["background"]:
            others[shown].append(key)
    again = []
    for shown, keys in others.items():
        for number in range(0, len(keys), SHARED_BY):
            texts = [
                text for key in keys[number : number + SHARED_BY] for text in told[key] if STYLED.search(text)
            ]
            again.append(by_key[shown] | {"key": f"{shown}-{number}", "captions": list(dict.fromkeys(texts))})
    return again


def held_out(rows: Iterable[Row], style_of: dict[str, str]) -> set[tuple[str, str]]:
    """Pairs of a name, or of a concept, and a style that validation asks for."""
    validation = [row for row in rows if row["shard"] == "val"]
    return {(row[kind], style_of[set_of(row)]) for row in validation for kind in ("name", "concept")}


def set_of(row: Row) -> str:
    return str(row["key"].split("_")[0])


def with_style(text: str, style: str) -> str:
    return text if STYLED.search(text) else STYLES[style][1].format(text)


def place_of(row: Row) -> str:
    return "" if row["background"] == "white" else f" on a {row['background']} background"


def noun_of(row: Row, style: str) -> str:
    """The drawing's name with its article, as its captions have it."""
    before, after = (form.replace("{}", "") for form in STYLES[style])
    for text in row["captions"]:
        if text.startswith(before):
            return BACKGROUND.sub("", text.removeprefix(before))
    for text in row["captions"]:
        if text.endswith(after):
            return BACKGROUND.sub("", text.removesuffix(after))
    return f"a {row['captions'][1]}"


def drawings_by_name(
    rows: Iterable[Row], style_of: dict[str, str], left_out: Iterable[str] = ()
) -> dict[str, dict[str, Row]]:
    """For each name that is trained on, its drawings by style."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["shard"] != "val" and set_of(row) not in left_out:
            found[row["name"]].setdefault(style_of[set_of(row)], row)
    return found


def house_drawings(
    rows: Iterable[Row], style_of: dict[str, str], left_out: Iterable[str] = ()
) -> dict[str, str]:
    """For each name the key of the drawing that it means when no style is said."""
    by_name = drawings_by_name(rows, style_of, left_out)
    return {name: house_drawing(drawings) for name, drawings in by_name.items()}


def house_drawing(drawings: dict[str, Row]) -> str:
    """The key of one of the drawings of a name, by style: the first in HOUSE, on white if one is."""
    order = [drawings[style] for style in HOUSE if style in drawings]
    return str(next((row for row in order if row["background"] == "white"), order[0])["key"])


def short_names(rows: Sequence[Row], house: set[str]) -> dict[str, list[str]]:
    """Nouns that say no more than a colour less ("apple" for the red one), by the key of the drawing they
    mean: the first in the order of Unicode, where nothing else is called that."""
    taken = {text.lower() for row in rows for text in (row["name"], row["captions"][1])} | set(DRAWN_SHAPES)
    found: dict[str, list[str]] = {}
    for row in sorted((row for row in rows if row["key"] in house), key=lambda row: row["emoji"]):
        words = row["captions"][1].split()
        if len(words) == 2 and words[0] in COLOURS and words[1] not in taken:
            taken.add(words[1])
            found.setdefault(row["key"], []).append(words[1])
    return found


def stand_ins(by_name: dict[str, dict[str, Row]], unheard: set[tuple[str, str]]) -> dict[str, list[str]]:
    """The styles in which each drawing is told beside its own, by key."""
    found: dict[str, list[str]] = {}
    for name, drawings in by_name.items():
        concept = next(iter(drawings.values()))["concept"]
        for style in STYLES:
            if style in MADE or {(name, style), (concept, style)} & unheard:
                continue
            nearest = [
                other for other in (*ALIKE.get(style, ()), *HOUSE) if other != style and other in drawings
            ]
            if nearest:
                found.setdefault(drawings[nearest[0]]["key"], []).append(style)
    return found
