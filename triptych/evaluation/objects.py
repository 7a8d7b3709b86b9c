"""Structured prompts over everyday things, for models of photographs, after GenEval [Ghosh 2023].

One skill each: one thing, two things, a count, a colour, a position, colours bound to two things. A prompt's
truth is in GenEval's own form, so that its published file of prompts is understood as well:

    {"include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 2, "color": "red",
                                                "position": ["left of", 0]}],
     "exclude": [{"class": "cup", "count": 3}]}

`include[1]` stands left of `include[0]`; `exclude` says from which number on there are too many.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from triptych.evaluation.structured import distinct_rows

PER_KIND = 20
NUMBERS = {2: "two", 3: "three", 4: "four"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# Classes of COCO that are drawn whole, stand alone, and are not of one colour by nature.
THINGS = (
    *("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "backpack", "umbrella", "handbag", "tie"),
    *("suitcase", "frisbee", "kite", "skateboard", "surfboard", "bottle", "cup", "fork", "knife", "spoon"),
    *("bowl", "cake", "chair", "couch", "bed", "toilet", "tv", "laptop", "cell phone", "microwave", "oven"),
    *("toaster", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "toothbrush"),
)
ANIMALS = {"cat", "dog", "horse", "sheep", "cow", "elephant", "bear"}
NO_COUNT = {"scissors"}  # a pair of them is one
PLURALS = {
    "bus": "buses",
    "bench": "benches",
    "knife": "knives",
    "couch": "couches",
    "toothbrush": "toothbrushes",
}
POSITIONS = ("left of", "right of", "above", "below")

Row = dict[str, Any]


def object_prompts(per_kind: int = PER_KIND) -> list[Row]:
    """`per_kind` prompts of each kind: "one", "two", "counting", "colours", "position", "binding".

    Each row has "prompt", "kind" and "truth".
    """
    makers: dict[str, Callable[[random.Random], tuple[str, Row]]] = {
        "one": _one,
        "two": _two,
        "counting": _counting,
        "colours": _colours,
        "position": _position,
        "binding": _binding,
    }

    def photo(make: Callable[[random.Random], tuple[str, Row]]) -> Callable[[random.Random], Row]:
        def row(rng: random.Random) -> Row:
            words, truth = make(rng)
            return {"prompt": f"a photo of {words}", "truth": truth}

        return row

    return distinct_rows("objects", {kind: photo(make) for kind, make in makers.items()}, per_kind)


def _one(rng: random.Random) -> tuple[str, Row]:
    thing = rng.choice(THINGS)
    return named(thing), {"include": [_asked(thing)]}


def _two(rng: random.Random) -> tuple[str, Row]:
    first, second = rng.sample(THINGS, 2)
    return f"{named(first)} and {named(second)}", {"include": [_asked(first), _asked(second)]}


def _counting(rng: random.Random) -> tuple[str, Row]:
    thing = rng.choice([name for name in THINGS if name not in NO_COUNT])
    number = rng.choice(tuple(NUMBERS))
    plural = {"sheep": "sheep"}.get(thing) or PLURALS.get(thing, f"{thing}s")
    truth = {"include": [_asked(thing, number)], "exclude": [_asked(thing, number + 1)]}
    return f"{NUMBERS[number]} {plural}", truth


def _colours(rng: random.Random) -> tuple[str, Row]:
    thing, colour = _coloured(rng)
    return named(thing, colour), {"include": [_asked(thing, color=colour)]}


def _position(rng: random.Random) -> tuple[str, Row]:
    first, second = rng.sample(THINGS, 2)
    position = rng.choice(POSITIONS)
    truth = {"include": [_asked(second), _asked(first, position=[position, 0])]}
    return f"{named(first)} {position} {named(second)}", truth


def _binding(rng: random.Random) -> tuple[str, Row]:
    (first, one), (second, other) = _coloured(rng), _coloured(rng)
    while first == second or one == other:
        second, other = _coloured(rng)
    truth = {"include": [_asked(first, color=one), _asked(second, color=other)]}
    return f"{named(first, one)} and {named(second, other)}", truth


def _coloured(rng: random.Random) -> tuple[str, str]:
    return rng.choice([name for name in THINGS if name not in ANIMALS]), rng.choice(COLOURS)


def named(thing: str, colour: str = "") -> str:
    """ "an orange cup" """
    words = f"{colour} {thing}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _asked(thing: str, count: int = 1, **more: Any) -> Row:
    return {"class": thing, "count": count, **more}
