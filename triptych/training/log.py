"""The log of a run: JSON lines always, TensorBoard where it is installed.

A continued run first drops the lines after its checkpoint, so the log never shows a step twice. A full disk
costs lines of the log, never the run. Of several processes the first one writes, for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from triptych.training.config import RunSettings
from triptych.training.processes import everyones, leads
from triptych.training.task import Losses

try:
    import resource
except ImportError:  # Windows has no such count
    resource = None  # type: ignore[assignment]

LEVELS = 10  # bins of t in [0, 1] in which losses are averaged


class RunLog:
    """Averages over `log_every` updates, one line each."""

    def __init__(self, out: Path, settings: RunSettings, step: int) -> None:
        self.path = out / "log.jsonl"
        self.settings = settings
        if leads():
            keep_lines(self.path, step)
        self.board = open_tensorboard(out, step) if settings.tensorboard and leads() else None
        self.first_step, self.first_time = step, time.monotonic()
        self.updates_skipped = 0  # since this process began
        self.in_a_row = 0  # of them, up to now
        self.clear()

    def clear(self) -> None:
        self.totals: dict[str, list[float]] = {}
        self.per_level: list[list[float]] = [[] for _ in range(LEVELS)]
        self.since, self.waited = time.monotonic(), 0.0

    def add(self, step: int, losses: dict[str, list[Losses]], norms: dict[str, float], rate: float) -> None:
        """Take in one update; every `log_every` updates a line is written."""
        for player, parts in losses.items():
            self.note(f"{player}.loss", [float(part.total) for part in parts])
            self.note(f"{player}.gradient_norm", [norms[player]])
            for part in parts:
                for name, value in part.terms.items():
                    self.note(f"{player}.{name}", [float(value)])
                if part.per_sample is not None and part.t is not None:
                    for t, loss in zip(part.t.tolist(), part.per_sample.tolist(), strict=True):
                        self.per_level[min(int(t * LEVELS), LEVELS - 1)].append(loss)
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            self.write(step, rate)

    def wait(self, seconds: float) -> None:
        """Take in how long an update waited for its pictures."""
        self.waited += seconds

    def note(self, name: str, values: list[float]) -> None:
        self.totals.setdefault(name, []).extend(values)

    def write(self, step: int, rate: float) -> None:
        parts = everyones((self.totals, self.per_level))
        if not leads():
            return self.clear()
        self.totals = {name: [v for totals, _ in parts for v in totals[name]] for name in self.totals}
        self.per_level = [[v for _, levels in parts for v in levels[level]] for level in range(LEVELS)]
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 1), "lr": rate}
        line |= {name: sum(values) / len(values) for name, values in self.totals.items()}
        done = step - self.first_step
        line["samples_per_second"] = done * self.settings.batch / max(now - self.first_time, 1e-9)
        line["seconds_left"] = (now - self.first_time) / max(done, 1) * (self.settings.steps - step)
        line["wait_fraction"] = min(self.waited / max(now - self.since, 1e-9), 1.0)
        if self.updates_skipped:
            line["updates_skipped"] = self.updates_skipped
        if any(self.per_level):
            line["loss_by_t"] = [sum(v) / len(v) if v else None for v in self.per_level]
        if resource is not None:  # kilobytes, but bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            line["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available():
            line["gpu_bytes"] = torch.cuda.max_memory_allocated()
        try:
            append_line(self.path, json.dumps(line))
            self.show(step, line)
        except OSError as error:
            print(f"The log has no line of step {step}: {error.strerror or error}.", file=sys.stderr)
        self.clear()

    def show(self, step: int, line: dict[str, Any]) -> None:
        """The line for TensorBoard."""
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, float | int) and name not in ("step", "time"):
                    self.board.add_scalar(name.replace(".", "/"), value, step)
            for level, value in enumerate(line.get("loss_by_t", [])):
                if value is not None:
                    self.board.add_scalar(f"loss_by_t/{level / LEVELS:.1f}", value, step)

    def close(self) -> None:
        """Flush and close what TensorBoard reads."""
        if self.board is not None:
            self.board.close()


def append_line(path: Path, line: str) -> None:
    """Add a whole line to a file, or nothing: a part of one is taken back. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        content = line.encode("utf-8") + b"\n"
        try:
            if file.write(content) != len(content):  # the disk took only some of it
                raise OSError("the disk is full")
        except OSError:
            os.truncate(path, start)
            raise


def keep_lines(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError):
            break
        kept += len(line)
    os.truncate(path, kept)


def open_tensorboard(out: Path, step: int) -> Any:
    """A TensorBoard writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
