"""What takes part in a comparison: a triptych model with settings, or a folder of pictures.

A system is given tasks (prompt and seed) and hands back pictures, each with the settings that made it. It
opens its weights in `load` and lets go of them in `close`; before, `describe` already tells all its settings.
Pipelines of diffusers are in `diffusers_systems`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from triptych import __version__
from triptych.errors import DataError
from triptych.images import read_picture
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.request import MAX_BATCH, Request

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TASKS_PER_NETWORK_BATCH = 4  # prompts of one length share a call: more tasks at once fill more batches


@dataclass(frozen=True)
class Task:
    """One picture to be made. `stem` is its file's name without suffix."""

    index: int  # of the prompt
    prompt: str
    seed: int
    stem: str


@dataclass
class Drawn:
    """One picture made, and what its PNG stores."""

    task: Task
    image: Image.Image
    metadata: dict[str, Any]


class System(Protocol):
    """Something that draws. `chunk` is how many tasks it wants at once."""

    @property
    def name(self) -> str: ...

    @property
    def chunk(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Plain values that, with the tasks, decide the pictures."""
        ...

    def load(self) -> None: ...

    def draw(self, tasks: Sequence[Task]) -> Iterator[Drawn]: ...

    def close(self) -> None: ...


@dataclass
class TriptychSystem:
    """A cascade and the fields of `Request` that differ from its defaults."""

    name: str
    settings: dict[str, Any]
    _cascade: Cascade | None = field(default=None, repr=False)

    @property
    def chunk(self) -> int:
        return TASKS_PER_NETWORK_BATCH * int(self.settings.get("batch") or MAX_BATCH)

    def describe(self) -> dict[str, Any]:
        stored = Request(prompt="", **self.settings).model_dump(mode="json")
        return {"kind": "triptych", "model": stored["model"], **{key: stored[key] for key in self.settings}}

    def load(self) -> None:
        """Find the files and check the settings against them; weights are read with the first picture."""
        request = Request(prompt="", **self.settings)
        self._cascade = Cascade.for_request(request)
        self._cascade.resolve(request)

    def draw(self, tasks: Sequence[Task]) -> Iterator[Drawn]:
        assert self._cascade is not None
        seeds = tuple(task.seed for task in tasks)
        for event in self._cascade.stream([task.prompt for task in tasks], seeds=seeds, **self.settings):
            if event.image is not None and event.metadata is not None:
                task = tasks[event.pictures[event.step - 1].index]
                yield Drawn(task, event.image, event.metadata)

    def loading_seconds(self) -> float:
        """Of the last call of `draw`."""
        return 0.0 if self._cascade is None else self._cascade.parts.timings.get("load", 0.0)

    def close(self) -> None:
        if self._cascade is not None:
            self._cascade.parts.release()
        self._cascade = None


@dataclass
class FolderSystem:
    """Pictures made elsewhere, one per prompt: FOLDER/00012.png is that of prompt 12 (from 0).

    A number of seeds asks for FOLDER/00012-1000012.png, named as a comparison names its own pictures, so
    that the pictures of one comparison take part in another.
    """

    name: str
    folder: Path
    chunk: int = 16

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "folder": str(self.folder)}

    def load(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f'The folder {self.folder} of the system "{self.name}" does not exist.')

    def draw(self, tasks: Sequence[Task]) -> Iterator[Drawn]:
        for task in tasks:
            path = self._path(task)
            metadata = {
                "version": __version__,
                "prompt": task.prompt,
                "seed": task.seed,
                "settings": {**self.describe(), "file": path.name},
            }
            yield Drawn(task, read_picture(path), metadata)

    def close(self) -> None:
        pass

    def _path(self, task: Task) -> Path:
        for stem in (task.stem, f"{task.index:05d}"):
            for suffix in PICTURE_SUFFIXES:
                if (self.folder / f"{stem}{suffix}").is_file():
                    return self.folder / f"{stem}{suffix}"
        raise DataError(
            f'{self.folder} has no picture of prompt {task.index} ("{task.prompt[:60]}"): '
            f"{task.stem}.png or {task.index:05d}.png was expected."
        )
