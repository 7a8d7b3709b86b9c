"""Other words for the drawings that bare names mean, so that they can be asked for without their names.

Four kinds (docs/mini.md tells what they bring): what a dictionary says the name means, with synonyms; all
keywords of the drawing; a few of them that no other name has together ("fruit, school, delicious"); and, for
the drawing of its kind with most of a colour, kind and colour ("a crimson fruit").
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ICONS = Path(__file__).with_name("icons")
MEANINGS, KEYWORDS = ICONS / "meanings.json", ICONS / "keywords.json"
LEAST_KEYWORDS = 3  # with fewer, keywords alone do not tell what is meant
FEW = (2, 3, 3, 4)  # keywords that one caption may have
CAPTIONS_OF_FEW = 6  # of a name, at most
TRIES = 60
KINDS = {  # of the catalogue's subgroups
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-sweet": "sweet",
    "drink": "drink",
    "animal-bird": "bird",
    "animal-bug": "insect",
    "animal-mammal": "animal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "plant-flower": "flower",
    "plant-other": "plant",
    "clothing": "garment",
    "household": "household item",
    "tool": "tool",
    "musical-instrument": "musical instrument",
    "game": "game",
    "sport": "sport",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "place-building": "building",
    "heart": "heart",
}
SHADES = {
    "red": ("crimson", "scarlet"),
    "orange": ("bright orange",),
    "yellow": ("golden", "amber"),
    "green": ("emerald", "lime green"),
    "blue": ("azure", "navy blue"),
    "purple": ("violet", "lavender"),
    "brown": ("chestnut", "chocolate brown"),
    "pink": ("rosy",),
    "gray": ("silver", "grey"),
    "beige": ("cream-coloured",),
}
MOST = 0.5  # share of a drawing that a colour has at least, to speak of
SECOND = 0.1  # and the next colour


def other_words(house: Iterable[Row]) -> dict[str, list[str]]:
    """What else says what these drawings show, by key; `house` has one drawing of each name."""
    rows = sorted(house, key=lambda row: row["key"])
    of = {row["key"]: keywords_of(row) for row in rows}
    has = defaultdict(set)
    for key, words in of.items():
        for word in words:
            has[stem(word)].add(key)
    by_kind = kinds_and_colours(rows)
    found = {}
    for row in rows:
        key, words = row["key"], of[row["key"]]
        texts = list(meanings().get(row["name"], ()))
        if words:
            texts += [", ".join(words), ", ".join([row["name"], *words])]
        nameless = without_name(row, words)
        if len(nameless) >= LEAST_KEYWORDS:
            texts.append(", ".join(nameless))
        texts += few_of(nameless, has, key)
        texts += by_kind.get(key, ())
        found[key] = list(dict.fromkeys(texts))
    return found


def keywords_of(row: Row) -> list[str]:
    """Keywords of the catalogue and those of emojilib."""
    return list(
        dict.fromkeys([*(word.lower() for word in row["keywords"]), *keywords().get(row["name"], ())])
    )


def without_name(row: Row, words: Iterable[str]) -> list[str]:
    """Keywords that share no word with the drawing's name."""
    said = {stem(word) for word in re.findall(r"[a-z]+", f"{row['name']} {row['captions'][1]}".lower())}
    return [word for word in words if not said & {stem(part) for part in word.split()}]


def few_of(words: list[str], has: dict[str, set[str]], key: str) -> list[str]:
    """Captions of a few of the keywords, seeded by the drawing's key, that it alone `has` together."""
    draw, seen, found = random.Random(key), set[frozenset[str]](), []
    for _ in range(TRIES if len(words) >= min(FEW) else 0):
        few = draw.sample(words, min(len(words), draw.choice(FEW)))
        if frozenset(few) not in seen and set.intersection(*(has[stem(word)] for word in few)) == {key}:
            seen.add(frozenset(few))
            found.append((" " if len(few) == min(FEW) else ", ").join(few))
        if len(found) == CAPTIONS_OF_FEW:
            break
    return found


def kinds_and_colours(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Captions of kind and colour, by the key of the drawing of that kind with most of that colour."""
    most: dict[tuple[str, str], tuple[float, Row]] = {}
    for row in rows:
        kind, (colour, share) = KINDS.get(row["subgroup"]), row["colours"][0]
        if kind and share >= MOST and share > most.get((kind, colour), (0.0, row))[0]:
            most[kind, colour] = share, row
    found = defaultdict(list)
    for (kind, colour), (_, row) in most.items():
        named = [colour, *SHADES.get(colour, ())]
        named += [f"{colour} and {other}" for other, share in row["colours"][1:2] if share >= SECOND]
        found[row["key"]] += [with_article(f"{one} {kind}") for one in named]
    return found


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def stem(word: str) -> str:
    return word.removesuffix("s")


@cache
def meanings() -> dict[str, list[str]]:
    """Meanings by name, from WordNet (make_icon_words.py)."""
    found: dict[str, list[str]] = json.loads(MEANINGS.read_text(encoding="utf-8"))
    return found


@cache
def keywords() -> dict[str, list[str]]:
    """More keywords by name, from emojilib (make_icon_words.py)."""
    found: dict[str, list[str]] = json.loads(KEYWORDS.read_text(encoding="utf-8"))
    return found
