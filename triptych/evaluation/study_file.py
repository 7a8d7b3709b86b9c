"""The file that describes a comparison, study.toml: prompts, seeds, systems.

    prompts = ["parti", "aesthetic"]     named sets or files
    seeds = [0]
    out = "runs/study"

    [[systems]]                          a triptych model: the fields of a request
    name = "ours"
    model = "cascade"

    [[systems]]                          a published competitor
    name = "sdxl"
    preset = "sdxl"

    [[systems]]                          any pipeline of diffusers
    name = "mine"
    pipeline = "StableDiffusionXLPipeline"
    model = "folder/in/the/hub/layout"

    [[systems]]                          pictures made elsewhere
    name = "last year"
    folder = "pictures"

`judges = ["clipscore", "detector"]` with `judge_weights = "weights"` has every picture judged by networks
whose files lie in weights/clipscore and weights/detector.

The first system is the one that the others are compared with. `{here}` stands for the folder of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from triptych.errors import RequestError, SettingsError, nearest
from triptych.evaluation.diffusers_systems import DiffusersSettings, DiffusersSystem, with_preset
from triptych.evaluation.prompts import StudyPrompt, study_prompts
from triptych.evaluation.systems import FolderSystem, System, TriptychSystem
from triptych.pipelines.request import Request, Seed, Size, explain
from triptych.training.config import read_toml, substitute

KINDS = ("triptych", "diffusers", "folder")
OF_THE_STUDY = ("prompt", "count", "seed", "seeds", "strength")  # fields of a request that tasks decide


def one_or_more(value: Any) -> Any:
    """A single value where a list may stand."""
    return value if isinstance(value, list | tuple) else [value]


class StudySettings(BaseModel):
    """Everything beside the systems."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", description="title of the sheet and the report")
    out: str = Field("", description="folder for everything that is made")
    prompts: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        min_length=1, description="named sets (parti, aesthetic, structured, ...) or files"
    )
    count: int | None = Field(None, ge=1, description="so many of each set, at even distances; all")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="pictures of each prompt")
    size: Size | None = Field(None, description="of the triptych and diffusers systems that state none")
    device: str = Field("auto", description="of the systems that state none")
    judges: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (), description="published judges of the pictures (clipscore, hps, ...), and detector"
    )
    judge_weights: str = Field("", description="folder with a folder of weights for every judge")


class Study:
    """A comparison as its file describes it, checked: settings, prompts and systems (nothing loaded)."""

    def __init__(
        self, settings: StudySettings, prompts: Sequence[StudyPrompt], systems: Sequence[System]
    ) -> None:
        self.settings = settings
        self.prompts = tuple(prompts)
        self.systems = tuple(systems)


def read_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """The study of a TOML file, then `key=value` changes. Raises SettingsError or DataError."""
    raw = read_toml(path, changes)
    raw = substitute(raw, {"here": str(path.parent)})
    tables = raw.pop("systems", [])
    try:
        settings = StudySettings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain(error, StudySettings)}") from None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{path} names no systems: each is a table [[systems]] with a name.")
    systems = [read_system(table, settings, f"{path}: system {n}") for n, table in enumerate(tables, 1)]
    names = [system.name for system in systems]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SettingsError(f'{path}: two systems are called "{doubled[0]}"; names must differ.')
    prompts = [p for source in settings.prompts for p in study_prompts(source, settings.count)]
    return Study(settings, prompts, systems)


def read_system(table: Mapping[str, Any], study: StudySettings, place: str) -> System:
    """One system from its table; `place` begins the messages of errors."""
    rest = dict(table)
    name = rest.pop("name", None)
    # The name becomes a folder's, and must mean the same on every file system.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,60}", name):
        raise SettingsError(
            f"{place} needs a name of letters, digits, blanks, dots and dashes, got {name!r}."
        )
    place = f'{place} ("{name}")'
    kind = rest.pop("kind", None) or _kind(rest)
    if kind not in KINDS:
        raise SettingsError(f'{place}: there is no kind "{kind}": {nearest(str(kind), KINDS)}.')
    if kind == "folder":
        return _folder(name, rest, place)
    rest = {**({} if study.device == "auto" else {"device": study.device}), **rest}
    if kind == "diffusers":
        return _diffusers(name, rest, study, place)
    for key in OF_THE_STUDY:
        if key in rest:
            raise SettingsError(f"{place}: {key} is the same for all systems; take it out.")
    if study.size is not None:
        rest.setdefault("size", study.size)
    try:
        Request(prompt="", **rest)
    except RequestError as error:
        raise SettingsError(f"{place}: {error}") from None
    return TriptychSystem(name, rest)


def _kind(table: Mapping[str, Any]) -> str:
    if "preset" in table or "pipeline" in table:
        return "diffusers"
    return "folder" if "folder" in table else "triptych"


def _folder(name: str, table: dict[str, Any], place: str) -> FolderSystem:
    unknown = sorted(set(table) - {"folder"})
    if unknown or not isinstance(table.get("folder"), str):
        said = f'there is no setting "{unknown[0]}" for a folder' if unknown else "its folder is missing"
        raise SettingsError(f"{place}: {said}.")
    return FolderSystem(name, Path(table["folder"]))


def _diffusers(name: str, table: dict[str, Any], study: StudySettings, place: str) -> DiffusersSystem:
    preset = table.pop("preset", "")
    try:
        if preset:
            table = with_preset(preset, table)
        elif study.size is not None:
            table.setdefault("size", study.size)
        return DiffusersSystem(name, DiffusersSettings.model_validate(table), preset)
    except ValidationError as error:
        raise SettingsError(f"{place}: {explain(error, DiffusersSettings)}") from None
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None
