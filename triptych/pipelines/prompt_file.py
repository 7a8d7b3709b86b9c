"""A file that asks for many pictures: one prompt, or one JSON object of `Request` fields, on each line.

Pictures of a line are named after its number, so what an earlier run finished is found again in the folder:
a picture is done when a file there carries its prompt, its seed and the same settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import DataError, RequestError
from triptych.images import picture_stem, read_metadata
from triptych.pipelines.request import Picture, Request, recall

FIRST_SEED = 0  # of lines that name none: a drawn one would be another in the next run
# What a picture shows does not depend on these, or is told in other ways.
WHICH = {"prompt", "seed", "seeds", "count"}
HOW = {"batch", "device", "dtype", "low_memory", "max_memory", "int8"}


@dataclass(frozen=True)
class Line:
    """What one line asks for. `number` counts from 1, as editors do."""

    number: int
    request: Request


@dataclass(frozen=True)
class Wanted:
    """One picture of a line; `request` is the line's, resolved."""

    line: int
    picture: Picture
    request: Request

    @property
    def stem(self) -> str:
        """Its file name without suffix.

        >>> Wanted(12, Picture(0, "A red apple", 7), Request(prompt="A red apple")).stem
        '0012-a-red-apple-7'
        """
        return f"{self.line:04d}-{picture_stem(self.picture.prompt, self.picture.seed)}"

    @property
    def place(self) -> tuple[int, int]:
        """Its line and its number there: what tells it from all others."""
        return self.line, self.picture.index

    @property
    def settings(self) -> str:
        """What its picture has in common with others that can share its network calls."""
        return self.request.model_dump_json(exclude=WHICH)


def read_prompt_file(path: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """The requests in `path`: JSON objects if it ends in .jsonl, else prompts, taken literally.

    Empty lines are passed over. `defaults` are Request fields for lines that do not set them. Raises
    DataError for an unreadable file and RequestError, naming the line, for what is wrong in one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}; --prompts takes a text file or a .jsonl file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    lines = []
    for number, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                own = _fields(content) if path.suffix == ".jsonl" else {"prompt": content.strip()}
                lines.append(Line(number, Request(**{"seed": FIRST_SEED, **defaults, **_seeded(own)})))
            except RequestError as error:
                raise RequestError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise RequestError(f"{path} has no prompts; write one on each line.")
    return lines


def _fields(content: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise RequestError(f"this is not JSON: {error}.") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise RequestError('a JSON object with a "prompt" was expected.')
    return fields


def _seeded(fields: dict[str, Any]) -> dict[str, Any]:
    """Seeds of its own leave no place for a first seed."""
    return {**fields, "seed": None} if fields.get("seeds") is not None else fields


def pictures_of(line: int, request: Request) -> list[Wanted]:
    """All pictures of a line, whose request is resolved."""
    return [Wanted(line, picture, request) for picture in request.pictures()]


def missing(wanted: Iterable[Wanted], folder: Path) -> list[Wanted]:
    """Those that are not among the pictures of `folder`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        found.setdefault(path.name.split("-")[0], []).append(path)
    return [one for one in wanted if not any(_shows(path, one) for path in found.get(f"{one.line:04d}", ()))]


def _shows(path: Path, wanted: Wanted) -> bool:
    if not path.name.startswith(wanted.stem):
        return False
    try:
        request, picture = recall(read_metadata(path), path)
    except (DataError, RequestError):  # damaged, or made by something else
        return False
    same = picture.prompt == wanted.picture.prompt and picture.seed == wanted.picture.seed
    return same and _shown(request) == _shown(wanted.request)


def _shown(request: Request) -> dict[str, Any]:
    return request.model_dump(exclude=WHICH | HOW)


def together(wanted: Sequence[Wanted], most: int) -> list[list[Wanted]]:
    """Groups of equal settings, in the order of the file, of `most` pictures each."""
    groups: dict[str, list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(one.settings, []).append(one)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def joined(group: Sequence[Wanted]) -> Request:
    """One request for pictures of equal settings."""
    return group[0].request.replaced(
        prompt=tuple(one.picture.prompt for one in group),
        seeds=tuple(one.picture.seed for one in group),
        seed=None,
        count=1,
    )
