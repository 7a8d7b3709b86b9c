"""The fixed prompts of `triptych evaluate`, kept beside this file as lines of JSON.

Each set has 100 prompts by default and all of the validation captions with `everything`.
scripts/make_prompts.py writes them from the validation shards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

SHAPES_SETS = ("shapes_single", "shapes_pairs", "shapes_heldout")
ICONS_SET = "icons_100"
FULL_SHAPES, FULL_ICONS = "shapes_val", "icons_val"


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt with what must be seen. `relations` and `background` only if the prompt states them."""

    prompt: str
    objects: tuple[dict[str, str], ...]  # each with "shape" and "colour"
    relations: tuple[dict[str, Any], ...]  # "subject", "relation", "object", as in the shapes' JSON
    background: str | None
    kind: str
    subset: str
    key: str


@dataclass(frozen=True)
class IconPrompt:
    """A prompt with the concept that must rank first."""

    prompt: str
    concept: str
    style: str
    key: str


def shapes_prompts(everything: bool = False) -> dict[str, list[ShapesPrompt]]:
    """The shapes prompts by set: one object, pairs with a relation, held-out pairs; or all of validation."""
    names = (FULL_SHAPES,) if everything else SHAPES_SETS
    return {name: [_shapes_prompt(row) for row in _rows(name)] for name in names}


def icon_prompts(everything: bool = False) -> list[IconPrompt]:
    """One prompt for each of the judge's concepts, or every validation caption of them."""
    return [IconPrompt(**row) for row in _rows(FULL_ICONS if everything else ICONS_SET)]


def _shapes_prompt(row: dict[str, Any]) -> ShapesPrompt:
    return ShapesPrompt(**{**row, "objects": tuple(row["objects"]), "relations": tuple(row["relations"])})


def _rows(name: str) -> list[dict[str, Any]]:
    text = (files("triptych.evaluation") / "prompt_sets" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
