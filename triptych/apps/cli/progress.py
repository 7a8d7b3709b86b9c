"""Live progress on standard error: bars on a terminal, nothing in a log or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.pipelines.cascade import Event

LABELS = {"stage_c": "Stage C", "stage_b": "Stage B"}


@contextmanager
def stage_progress() -> Iterator[Callable[[Event], None]]:
    """A function to call with every event while pictures are made."""
    if not sys.stderr.isatty():
        yield _quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {stage: progress.add_task(label, total=None) for stage, label in LABELS.items()}

        def show(event: Event) -> None:
            if event.stage == "stage_c" and event.step == 1:  # another batch begins
                progress.reset(bars["stage_b"], start=False)
            if event.stage in bars:
                progress.update(bars[event.stage], total=event.steps, completed=event.step)

        yield show


def _quiet(event: Event) -> None:
    """Elsewhere than on a terminal an error must stand alone on standard error."""
