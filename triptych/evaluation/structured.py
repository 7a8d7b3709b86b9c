"""Structured prompts over plain shapes: one skill each, checked object by object, after GenEval [Ghosh 2023].

GenEval asks for one object, two objects, a count, a colour, a position and colours bound to two objects.
Here the objects are the shapes that the pixel judge can see, so that no detector is needed. The prompts
follow from the constants below; no pair of colour and shape is used that training never shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from triptych.data.shapes import ABOVE, CLASHES, COLOURS, HELDOUT, LEFT_OF, SHAPES

PER_KIND = 20
NUMBERS = {2: "two", 3: "three", 4: "four"}
POSITIONS = {  # phrase -> relation, whether the first object named is its subject
    "to the left of": (LEFT_OF, True),
    "to the right of": (LEFT_OF, False),
    "above": (ABOVE, True),
    "below": (ABOVE, False),
}
UNSEEN_ON_WHITE = {"white"}

Row = dict[str, Any]


def structured_prompts(per_kind: int = PER_KIND) -> list[Row]:
    """`per_kind` prompts of each kind: "single", "colours", "counting", "binding", "position".

    Each row has "prompt", "kind", "objects" (with "shape" and "colour"), "relations" and "background".
    """
    makers: dict[str, Callable[[random.Random], Row]] = {
        "single": _single,
        "colours": _colours,
        "counting": _counting,
        "binding": _binding,
        "position": _position,
    }
    rows = distinct_rows("structured", makers, per_kind)
    return [{"background": None, "relations": [], **row} for row in rows]


def distinct_rows(
    topic: str, makers: Mapping[str, Callable[[random.Random], Row]], per_kind: int
) -> list[Row]:
    """`per_kind` rows of each kind by its maker, no two with one "prompt"; each row gets its "kind".

    The same `topic` and makers give the same rows.
    """
    rows: list[Row] = []
    for kind, make in makers.items():
        rng = random.Random(f"{topic}:{kind}")
        found: dict[str, Row] = {}
        while len(found) < per_kind:
            row = make(rng)
            found.setdefault(row["prompt"], {"kind": kind, **row})
        rows += found.values()
    return rows


def _single(rng: random.Random) -> Row:
    """One object on a stated background: is it there, alone?"""
    colour, shape = _look(rng)
    background = rng.choice([name for name, clashing in CLASHES.items() if colour not in clashing])
    prompt = f"{_named((colour, shape))} on a {background} background"
    return {"prompt": prompt, "objects": [_object(colour, shape)], "background": background}


def _colours(rng: random.Random) -> Row:
    """One object, its colour the point."""
    colour, shape = _look(rng)
    return {"prompt": _named((colour, shape)), "objects": [_object(colour, shape)]}


def _counting(rng: random.Random) -> Row:
    colour, shape = _look(rng)
    number = rng.choice(tuple(NUMBERS))
    plural = {"cross": "crosses"}.get(shape, f"{shape}s")
    return {"prompt": f"{NUMBERS[number]} {colour} {plural}", "objects": [_object(colour, shape)] * number}


def _binding(rng: random.Random) -> Row:
    """Two objects that differ in colour and shape: which colour belongs to which?"""
    first, second = _two(rng)
    return {"prompt": f"{_named(first)} and {_named(second)}", "objects": [_object(*first), _object(*second)]}


def _position(rng: random.Random) -> Row:
    first, second = _two(rng)
    phrase = rng.choice(tuple(POSITIONS))
    relation, in_order = POSITIONS[phrase]
    subject, other = (0, 1) if in_order else (1, 0)
    return {
        "prompt": f"{_named(first)} {phrase} {_named(second)}",
        "objects": [_object(*first), _object(*second)],
        "relations": [{"subject": subject, "relation": relation, "object": other}],
    }


def _look(rng: random.Random) -> tuple[str, str]:
    """A colour and a shape that training shows together."""
    while True:
        look = rng.choice(sorted(set(COLOURS) - UNSEEN_ON_WHITE)), rng.choice(SHAPES)
        if look not in HELDOUT:
            return look


def _two(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    while True:
        first, second = _look(rng), _look(rng)
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def _named(look: tuple[str, str]) -> str:
    return f"{'an' if look[0][0] in 'aeiou' else 'a'} {look[0]} {look[1]}"


def _object(colour: str, shape: str) -> dict[str, str]:
    return {"shape": shape, "colour": colour}
