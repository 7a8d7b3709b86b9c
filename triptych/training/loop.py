"""The training loop: batches, losses, updates, running average, log, samples, checkpoints.

A run is a folder. The same command on the same folder continues it; killed at any moment, it repeats the
steps since its last checkpoint exactly, because everything random follows from (seed, step).
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triptych.data.batches import stream
from triptych.errors import TrainingError
from triptych.pipelines.heap import keep_heap_warm
from triptych.training.checkpointing import save_memory
from triptych.training.config import RunSettings
from triptych.training.draws import DROPOUT, Draws, key
from triptych.training.fused import FusedUpdate, apply_gradients
from triptych.training.log import RunLog
from triptych.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    to_training_point,
    update_ema,
)
from triptych.training.processes import (
    AveragedGradients,
    anyone,
    averaging,
    check_equal,
    in_turn,
    joined,
    leads,
    own_places,
    rank,
    share_weights,
    world,
)
from triptych.training.recipes import build_task
from triptych.training.report import write_report
from triptych.training.saving import Tell, room_or_none, save_samples, skipped_anywhere, try_to_save
from triptych.training.sharding import shard_networks
from triptych.training.start import start_from
from triptych.training.state import State, settings_changed
from triptych.training.stopping import Stop
from triptych.training.task import Losses, Task

MOST_IN_A_ROW = 20  # updates left out for numbers that are none, before the run ends all the same
NAMED = 8  # pictures of a batch that a message names


@dataclass(frozen=True)
class Progress:
    """What a watcher of the run is told after every update (or while a cache is made: `what` "cache")."""

    what: str
    step: int
    steps: int
    loss: float = math.nan


def say(text: str) -> None:
    """Something the person who trains should know, on standard error."""
    print(text, file=sys.stderr, flush=True)


def train(
    settings: RunSettings,
    watch: Callable[[Progress], None] = lambda progress: None,
    stop: Stop | None = None,
    tell: Tell = say,
) -> Path:
    """Run, or continue, a training run to its last step. Returns its folder with the trained parts.

    When `stop` is asked, the run saves after the update at hand, notes the step in `stop.step` and returns.
    `tell` gets sentences about what the run got over: a full disk, settings that changed.
    Raises SettingsError, DataError, CheckpointError, CapacityError or TrainingError; what was saved stays
    valid.
    """
    out = Path(settings.out)
    with joined(settings) as device:
        if not leads():
            watch, tell = silent, silent
        out.mkdir(parents=True, exist_ok=True)
        if told := settings_changed(out, settings):
            tell(told)

        def build() -> Task:
            torch.manual_seed(key(settings.seed, DROPOUT))  # initial weights
            return build_task(settings, device, lambda done, of: watch(Progress("cache", done, of)))

        train_task(settings, in_turn(build), device, watch, stop or Stop(), tell)
    return out


def silent(event: Any) -> None:
    """What processes beside the first one say."""


def train_task(
    settings: RunSettings,
    task: Task,
    device: torch.device,
    watch: Callable[[Progress], None],
    stop: Stop,
    tell: Tell = say,
) -> None:
    """`train` for a task that is ready; `settings.out` is a folder that exists."""
    out = Path(settings.out)
    if settings.init is not None:
        start_from(task.networks, settings.init)
    share_weights(list(task.trained.values()))
    averages = dict(task.networks)
    if settings.ema.enabled:
        averages = {part: copy.deepcopy(net).eval().requires_grad_(False) for part, net in averages.items()}
    save_memory(settings, task.trunks)
    if not settings.checkpointing:  # narrow weights come with it
        keep_heap_warm(device)
    if settings.shard and world() > 1:
        shard_networks(dict.fromkeys([*task.trained.values(), *averages.values()]), device)
    optimizers, gradients = {}, {}
    narrow = settings.precision == "bfloat16"
    for player, parts in task.players.items():
        parameters = [p for part in parts for p in task.trained[part].parameters()]
        optimizers[player] = build_optimizer(parameters, settings.optim, narrow)
        if world() > 1 and not settings.shard:  # split networks average theirs by themselves
            gradients[player] = AveragedGradients([p for p in parameters if p.requires_grad])
    state = State(task, averages, optimizers, settings)
    state.restore(out)
    check_equal(state.step, "checkpoints")
    log = RunLog(out, settings, state.step)
    try:
        run(settings, task, state, gradients, log, device, watch, stop, tell)
    finally:
        log.close()


def run(
    settings: RunSettings,
    task: Task,
    state: State,
    gradients: Mapping[str, AveragedGradients],
    log: RunLog,
    device: torch.device,
    watch: Callable[[Progress], None],
    stop: Stop,
    tell: Tell,
) -> None:
    """All steps that are left."""
    out = Path(settings.out)
    if state.step == 0:
        save_samples(task, state, out, tell)
    batches = read_batches(settings, task, state.step)
    first_step, due = state.step, False
    stop.patient = True
    for step in range(state.step, settings.steps):
        asked = time.monotonic()
        parts = next(batches)
        if step > first_step:  # nothing could be read ahead for the first
            log.wait(time.monotonic() - asked)
        # Dropout is the only other use of randomness; its masks are a process's own.
        torch.manual_seed(key(settings.seed, DROPOUT, step, *([rank()] if rank() else [])))
        losses: dict[str, list[Losses]] = {}
        norms: dict[str, float] = {}
        for player in task.players:
            if step >= task.start_of.get(player, 0):
                averaged = gradients.get(player)
                losses[player], norms[player] = update(
                    settings, task, state, player, parts, averaged, step, device
                )
        left_out = [player for player in losses if not is_finite(losses[player], norms[player])]
        if left_out:
            pass_over(settings, task, state, log, left_out[0], step)
        log.in_a_row = log.in_a_row + 1 if left_out else 0
        losses = {player: parts for player, parts in losses.items() if player not in left_out}
        state.step = step + 1
        for part, average in state.averages.items():
            update_ema(average, task.networks[part], state.step, settings.ema)
        log.add(state.step, losses, norms, learning_rate(step, settings.optim))
        shown = sum(float(part.total) for part in next(iter(losses.values()), []))
        watch(Progress("train", state.step, settings.steps, shown if losses else math.nan))
        last = state.step == settings.steps
        asked_to_stop = anyone(stop.asked)
        ends = last or asked_to_stop
        if ends or due or state.step % settings.save_every == 0:
            due = not try_to_save(settings, task, state, out, tell, must=ends)
        if asked_to_stop and not last:
            stop.step = state.step
            break
        if state.step % settings.sample_every == 0 or last:
            save_samples(task, state, out, tell)
        if state.step % min(settings.save_every, settings.sample_every) == 0 or last:
            skipped = skipped_anywhere(task)
            if leads():
                with room_or_none("The report", tell):
                    write_report(out, settings, skipped)
    stop.patient = False


def update(
    settings: RunSettings,
    task: Task,
    state: State,
    player: str,
    parts: list[tuple[Any, Callable[[], Draws]]],
    gradients: AveragedGradients | None,
    step: int,
    device: torch.device,
) -> tuple[list[Losses], float]:
    """One update of one player: gradients of all parts of the batch, clipped, applied."""
    for name, network in task.trained.items():
        network.train()
        network.requires_grad_(name in task.players[player])
    optimizer = state.optimizers[player]
    buffers = [(b, b.clone()) for name in task.players[player] for b in task.trained[name].buffers()]
    set_learning_rate(optimizer, learning_rate(step, settings.optim))
    to_training_point(optimizer, True)
    fused = FusedUpdate(optimizer, settings.optim.clip, settings.seed)
    losses = []
    for number, (batch, draws) in enumerate(parts, 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            part = task.loss(player, batch, draws(), step)
        inside = fused.step(step) if settings.optim.fused_backward else nullcontext()
        with averaging(gradients, last=number == len(parts)), inside:
            (part.total / len(parts)).backward()
        losses.append(replace(part, total=part.total.detach()))
    norm = fused.norm
    if not settings.optim.fused_backward:
        by_layer = settings.optim.clip_by == "layer"
        norm = norm_of(clip_gradients(fused.parameters, settings.optim.clip, by_layer))
    if anyone(not is_finite(losses, norm)):
        norm = math.nan
    if is_finite(losses, norm):
        apply_gradients(optimizer, settings.seed, step)
    else:
        for buffer, kept in buffers:
            buffer.copy_(kept)
    optimizer.zero_grad(set_to_none=True)
    to_training_point(optimizer, False)
    return losses, norm


def norm_of(norm: Any) -> float:
    """A norm as a number; that of split gradients is put together first."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def is_finite(losses: list[Losses], norm: float) -> bool:
    """Whether an update can be made: no loss and no gradient that is not a number may reach the weights."""
    return math.isfinite(norm) and all(math.isfinite(float(part.total)) for part in losses)


def pass_over(settings: RunSettings, task: Task, state: State, log: RunLog, player: str, step: int) -> None:
    """Count an update that was left out, or end the run: by choice, or after too many in a row."""
    log.updates_skipped += 1
    if settings.not_finite == "skip" and log.in_a_row < MOST_IN_A_ROW:
        return
    names = [task.key_of(sample) for sample in task.order.plan(step).samples]
    batch = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    kept = f"The checkpoint of step {state.saved} is intact" if state.saved else "There is no checkpoint yet"
    often = f", nor was it in {log.in_a_row} steps before it," if log.in_a_row else ","
    advice = "" if log.in_a_row else ', or leave such updates out with not_finite = "skip"'
    raise TrainingError(
        f"The loss or gradient of {player} at step {step + 1} (pictures {batch}) is not a finite number"
        f"{often} so the update was not made. {kept} in {settings.out}: continue with a lower optim.lr or "
        f'precision = "float32"{advice}.'
    )


def read_batches(
    settings: RunSettings, task: Task, start: int
) -> Iterator[list[tuple[Any, Callable[[], Draws]]]]:
    """For each step the parts of its batch with their draws, read ahead in the background."""
    share = max(1, settings.batch // settings.accumulate)

    def load(step: int) -> Any:
        plan = task.order.plan(step)
        places = range(settings.batch)
        parts = [own_places(places[first : first + share]) for first in range(0, settings.batch, share)]
        return [(task.load(plan, part), lambda part=part: Draws(settings.seed, step, part)) for part in parts]

    return stream(load, start, settings.steps, settings.data.readers)
