"""What a run writes: its checkpoint, its weights, its samples; and what happens when the disk is full.

A checkpoint that cannot be written leaves the one before as it is. The run goes on, since stopping would lose
more, and tries again after every update.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from triptych.checkpoints.files import DISK_FULL, write_atomically, write_part
from triptych.checkpoints.int8 import narrow
from triptych.errors import CapacityError
from triptych.training.config import RunSettings
from triptych.training.processes import anyone, everyones, leads, world
from triptych.training.sharding import whole
from triptych.training.state import State
from triptych.training.task import Task
from triptych.training.text_tower import copy_tokenizer

STORE = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": None}

Tell = Callable[[str], None]


def save(settings: RunSettings, task: Task, state: State, out: Path) -> None:
    """The complete state, and the averaged networks as parts that generation can load.

    Every process calls this; the first one writes, since what needs all of them comes before.
    """
    skipped = skipped_anywhere(task)
    weights = {part: whole(average.state_dict()) for part, average in state.averages.items()}
    state.save(out)
    if not leads():
        return
    for part, average in state.averages.items():
        info = replace(task.info(part, average), step=state.step)
        if part == "text_encoder":
            copy_tokenizer(settings, out)
        if task.write is not None:
            task.write(out, part, average, info)
            continue
        tensors = narrow(weights[part]) if settings.store == "int8" else weights[part]
        write_part(out / f"{part}.safetensors", tensors, info, STORE[settings.store])
    texts = {"settings.json": json.dumps(settings.model_dump(), indent=1)}
    if skipped:
        texts["skipped.txt"] = "\n".join(skipped) + "\n"
    for name, text in texts.items():
        with write_atomically(out / name) as file:
            file.write(text.encode("utf-8"))


def skipped_anywhere(task: Task) -> list[str]:
    """The samples that any process could not read, each once."""
    return list(dict.fromkeys(line for lines in everyones(task.skipped()) for line in lines))


def try_to_save(settings: RunSettings, task: Task, state: State, out: Path, tell: Tell, must: bool) -> bool:
    """`save`; a full disk is told and tried again after the next update, unless the run ends here.

    Says whether it worked, the same in every process.
    """
    failed = False
    try:
        save(settings, task, state, out)
    except CapacityError as error:
        failed = True
        kept = (
            f"The checkpoint of step {state.saved} is kept" if state.saved else "There is no checkpoint yet"
        )
        if must:
            raise CapacityError(
                f"{error} {kept}: make room and give the same command again to continue from there."
            ) from None
        tell(f"Step {state.step}: {error} {kept}; the run goes on and tries again after every update.")
    return must or not anyone(failed)


def save_samples(task: Task, state: State, out: Path, tell: Tell) -> None:
    """A picture of what the averaged networks do now; split networks need every process to draw it."""
    split = world() > 1 and state.settings.shard
    for average in state.averages.values():
        average.eval()
    picture = task.sample(state.averages, out) if split or leads() else None
    if picture is not None and leads():
        folder = out / "samples"
        with room_or_none("The sample grid", tell):
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{state.step:07d}.png")


@contextlib.contextmanager
def room_or_none(what: str, tell: Tell) -> Iterator[None]:
    """For files a run can do without: a full disk is told, and training goes on."""
    try:
        yield
    except CapacityError as error:
        tell(f"{what} was not written: {error}")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        tell(f"{what} was not written: the disk is full.")
