"""Prompts for measuring: the fixed sets of `triptych evaluate`, and whatever `triptych compare` is given.

The fixed sets are kept beside this file. Those of `evaluate` have 100 prompts by default and all of the
validation captions with `everything`; scripts/make_prompts.py writes them from the validation shards.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from triptych.errors import DataError, nearest
from triptych.evaluation.objects import object_prompts
from triptych.evaluation.structured import structured_prompts

SHAPES_SETS = ("shapes_single", "shapes_pairs", "shapes_heldout")
ICONS_SET = "icons_100"
DESCRIBED_SET = "icons_described"
FULL_SHAPES, FULL_ICONS = "shapes_val", "icons_val"
PARTI, AESTHETIC, STRUCTURED, OBJECTS = "parti", "aesthetic", "structured", "objects"
NAMED_SETS = (PARTI, AESTHETIC, STRUCTURED, OBJECTS, *SHAPES_SETS, ICONS_SET, DESCRIBED_SET)
FILE_KINDS = (".txt", ".tsv", ".jsonl")


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


def structured_shapes() -> dict[str, list[ShapesPrompt]]:
    """The structured prompts by kind: single, colours, counting, binding, position."""
    found: dict[str, list[ShapesPrompt]] = {}
    for number, row in enumerate(structured_prompts()):
        known = {**row, "subset": STRUCTURED, "key": f"structured_{number:03d}"}
        found.setdefault(row["kind"], []).append(_shapes_prompt(known))
    return found


def icon_prompts(everything: bool = False) -> list[IconPrompt]:
    """One prompt for each of the judge's concepts, or every validation caption of them."""
    return [IconPrompt(**row) for row in _rows(FULL_ICONS if everything else ICONS_SET)]


def described_prompts() -> list[IconPrompt]:
    """Descriptions of the judge's concepts that do not say their names."""
    return [IconPrompt(**row) for row in _rows(DESCRIBED_SET)]


def _shapes_prompt(row: dict[str, Any]) -> ShapesPrompt:
    return ShapesPrompt(**{**row, "objects": tuple(row["objects"]), "relations": tuple(row["relations"])})


def _rows(name: str) -> list[dict[str, Any]]:
    text = (files("triptych.evaluation") / "prompt_sets" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class StudyPrompt:
    """A prompt that several systems are to draw.

    `truth` is what a judge needs, where the prompt has one: "objects", "relations" and "background" for the
    shapes judge, "concept" for the icon judge, "include" and "exclude" for a detector.
    """

    prompt: str
    category: str = ""
    challenge: str = ""
    source: str = ""
    truth: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}


def study_prompts(source: str, count: int | None = None) -> list[StudyPrompt]:
    """The prompts of a named set or of a file, all or `count` of them.

    Named sets: "parti" (PartiPrompts, 1,632 with category and challenge), "aesthetic" (100 of our own),
    "structured" (counting, colours, position, binding of shapes), "objects" (the same of everyday things),
    and the sets of `triptych evaluate`. Files: .txt (one prompt a line), .tsv (a header with a column Prompt,
    if wanted Category and Challenge) and .jsonl (objects with "prompt", if wanted "category", "challenge" and
    "truth"; GenEval's "tag", "include" and "exclude" are understood). `count` takes prompts at even distances
    from the list sorted by category, so that each has its share. Raises DataError.
    """
    prompts = _named(source) if source in NAMED_SETS else _from_file(Path(source))
    if not prompts:
        raise DataError(f"{source} holds no prompts.")
    if count is None or count >= len(prompts):
        return prompts
    alike = sorted(range(len(prompts)), key=lambda i: (prompts[i].category, prompts[i].challenge, i))
    chosen = sorted(alike[number * len(prompts) // count] for number in range(count))
    return [prompts[index] for index in chosen]


def _named(name: str) -> list[StudyPrompt]:
    if name in (PARTI, AESTHETIC):
        text = (files("triptych.evaluation") / "prompt_sets" / f"{name}.tsv").read_text(encoding="utf-8")
        return _from_table(text, name, name)
    if name == OBJECTS:
        return [StudyPrompt(r["prompt"], r["kind"], "", name, r["truth"]) for r in object_prompts()]
    if name == STRUCTURED:
        return [_with_truth(row, row["kind"], name) for row in structured_prompts()]
    return [_with_truth(row, row.get("kind") or row.get("style", ""), name) for row in _rows(name)]


def _with_truth(row: dict[str, Any], category: str, source: str) -> StudyPrompt:
    known = ("objects", "relations", "background", "concept")
    truth = {key: row[key] for key in known if row.get(key) is not None}
    return StudyPrompt(row["prompt"], category, row.get("subset", ""), source, truth)


def _from_file(path: Path) -> list[StudyPrompt]:
    if path.suffix not in FILE_KINDS or not path.is_file():
        known = nearest(str(path), NAMED_SETS)
        raise DataError(f'There are no prompts "{path}": give a file ({", ".join(FILE_KINDS)}); {known}.')
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from None
    if path.suffix == ".txt":
        return [StudyPrompt(line.strip(), source=path.stem) for line in text.splitlines() if line.strip()]
    if path.suffix == ".tsv":
        return _from_table(text, str(path), path.stem)
    return [
        _from_line(line, path, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()
    ]


def _from_table(text: str, origin: str, source: str) -> list[StudyPrompt]:
    """Tab-separated rows under a header; quotes have no meaning."""
    table = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = {name.strip().lower(): name for name in table.fieldnames or ()}
    if "prompt" not in names:
        raise DataError(f"{origin} has no column Prompt; its columns are {', '.join(names) or 'none'}.")

    def cell(row: dict[str, str | None], name: str) -> str:
        return (row.get(names.get(name, "")) or "").strip()

    rows = [row for row in table if cell(row, "prompt")]
    return [StudyPrompt(cell(r, "prompt"), cell(r, "category"), cell(r, "challenge"), source) for r in rows]


def _from_line(line: str, path: Path, number: int) -> StudyPrompt:
    try:
        row = json.loads(line)
        prompt = row["prompt"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f'{path}, line {number}: an object with a "prompt" was expected.') from None
    truth = row.get("truth") or {key: row[key] for key in ("include", "exclude") if row.get(key)}
    category = str(row.get("category", row.get("tag", "")))
    return StudyPrompt(str(prompt), category, str(row.get("challenge", "")), path.stem, truth)
