"""The training loop: batches, losses, updates, running average, log, samples, checkpoints.

A run is a folder. The same command on the same folder continues it; killed at any moment, it repeats the
steps since its last checkpoint exactly, because everything random follows from (seed, step).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triptych.checkpoints.files import read_tensors, write_part
from triptych.data.batches import stream
from triptych.errors import TrainingError
from triptych.pipelines.placement import choose_device
from triptych.training.config import RunSettings
from triptych.training.draws import DROPOUT, Draws, key
from triptych.training.log import RunLog
from triptych.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    update_ema,
)
from triptych.training.recipes import build_task
from triptych.training.report import write_report
from triptych.training.state import State, load_strictly
from triptych.training.task import Losses, Task

STORE = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Progress:
    """What a watcher of the run is told after every update (or while a cache is made: `what` "cache")."""

    what: str
    step: int
    steps: int
    loss: float = math.nan


def train(settings: RunSettings, watch: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Run, or continue, a training run to its last step. Returns its folder with the trained parts.

    Raises SettingsError, DataError, CheckpointError or TrainingError; what was saved stays valid.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(settings.device)
    torch.manual_seed(key(settings.seed, DROPOUT))  # initial weights
    task = build_task(settings, device, lambda done, of: watch(Progress("cache", done, of)))
    if settings.init is not None:
        start_from(task, Path(settings.init))
    averages = {
        part: copy.deepcopy(network).eval().requires_grad_(False) for part, network in task.networks.items()
    }
    optimizers = {
        player: build_optimizer(
            [p for part in parts for p in task.trained[part].parameters()], settings.optim
        )
        for player, parts in task.players.items()
    }
    state = State(task, averages, optimizers)
    state.restore(out)
    log = RunLog(out, settings, state.step)
    try:
        run(settings, task, state, log, device, watch)
    finally:
        log.close()
    return out


def run(
    settings: RunSettings,
    task: Task,
    state: State,
    log: RunLog,
    device: torch.device,
    watch: Callable[[Progress], None],
) -> None:
    """All steps that are left."""
    out = Path(settings.out)
    if state.step == 0:
        save_samples(task, state, out)
    batches = read_batches(settings, task, state.step)
    for step in range(state.step, settings.steps):
        parts = next(batches)
        torch.manual_seed(key(settings.seed, DROPOUT, step))  # dropout is the only other use of randomness
        losses: dict[str, list[Losses]] = {}
        norms: dict[str, float] = {}
        for player in task.players:
            if step >= task.start_of.get(player, 0):
                losses[player], norms[player] = update(settings, task, state, player, parts, step, device)
        state.step = step + 1
        for part, average in state.averages.items():
            update_ema(average, task.networks[part], state.step, settings.ema)
        log.add(state.step, losses, norms, learning_rate(step, settings.optim))
        first = next(iter(losses.values()))
        watch(
            Progress("train", state.step, settings.steps, sum(float(part.total.detach()) for part in first))
        )
        last = state.step == settings.steps
        if state.step % settings.sample_every == 0 or last:
            save_samples(task, state, out)
        if state.step % settings.save_every == 0 or last:
            save(settings, task, state, out)
        if state.step % min(settings.save_every, settings.sample_every) == 0 or last:
            write_report(out, settings, task.skipped())


def update(
    settings: RunSettings,
    task: Task,
    state: State,
    player: str,
    parts: list[tuple[Any, Callable[[], Draws]]],
    step: int,
    device: torch.device,
) -> tuple[list[Losses], float]:
    """One update of one player: gradients of all parts of the batch, clipped, applied."""
    for name, network in task.trained.items():
        network.train()
        network.requires_grad_(name in task.players[player])
    optimizer = state.optimizers[player]
    set_learning_rate(optimizer, learning_rate(step, settings.optim))
    losses = []
    for batch, draws in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            part = task.loss(player, batch, draws(), step)
        (part.total / len(parts)).backward()
        losses.append(replace(part, total=part.total.detach()))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(clip_gradients(parameters, settings.optim.clip))
    if not math.isfinite(norm):
        raise TrainingError(
            f"Step {step}: the gradient of {player} is not finite, so the update was not made. The last "
            "checkpoint is intact: continue from it with a lower optim.lr or float32 precision."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm


def read_batches(
    settings: RunSettings, task: Task, start: int
) -> Iterator[list[tuple[Any, Callable[[], Draws]]]]:
    """For each step the parts of its batch with their draws, read ahead in the background."""
    share = max(1, settings.batch // settings.accumulate)

    def load(step: int) -> Any:
        plan = task.order.plan(step)
        places = range(settings.batch)
        parts = [tuple(places[first : first + share]) for first in range(0, settings.batch, share)]
        return [(task.load(plan, part), lambda part=part: Draws(settings.seed, step, part)) for part in parts]

    return stream(load, start, settings.steps, settings.data.readers)


def save(settings: RunSettings, task: Task, state: State, out: Path) -> None:
    """The complete state, and the averaged networks as parts that generation can load."""
    state.save(out)
    for part, average in state.averages.items():
        info = replace(task.info(part, average), step=state.step)
        if task.write is not None:
            task.write(out, part, average, info)
        else:
            write_part(out / f"{part}.safetensors", average.state_dict(), info, STORE[settings.store])
    (out / "settings.json").write_text(json.dumps(settings.model_dump(), indent=1), encoding="utf-8")
    skipped = task.skipped()
    if skipped:
        (out / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")


def save_samples(task: Task, state: State, out: Path) -> None:
    """A picture of what the averaged networks do now."""
    picture = task.sample(state.averages, out)
    if picture is not None:
        folder = out / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{state.step:07d}.png")


def start_from(task: Task, folder: Path) -> None:
    """Begin with the weights of `folder`, one file a part (those a run writes, say)."""
    for part, network in task.networks.items():
        path = folder if folder.suffix == ".safetensors" else folder / f"{part}.safetensors"
        tensors = {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
                   for name, tensor in read_tensors(path, finite=True).items()}  # fmt: skip
        load_strictly(network, tensors, str(path))
