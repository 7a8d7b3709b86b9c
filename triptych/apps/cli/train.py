"""`triptych train`: run or continue training from recipe files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from triptych.training.loop import Progress

HELP = """Train a part of a cascade from a recipe, or continue a run that stopped.

Running the same command again continues where the last checkpoint was. A folder trains all recipes in it, in
the order of their needs; finished ones are skipped.

Examples:

  triptych train recipes/tiny/stage_c.toml --set out=runs/try

  triptych train recipes/mini

  triptych train run.toml --set steps=20000 --set optim.lr=3e-4
"""

ORDER = ("stage_a", "semantic", "image_encoder", "stage_b", "stage_c")  # B and C need the others' weights
QUIET_SECONDS = 30.0  # between two lines where there is no terminal


def train(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="recipe files, or folders of them")
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting (repeatable)")
    ] = None,
) -> None:
    """See HELP."""
    from triptych.errors import SettingsError
    from triptych.training.config import read_settings

    files: list[Path] = []
    for path in recipes:
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"{recipes[0]} holds no recipe: expected .toml files.")
    runs = [read_settings(file, changes or []) for file in files]  # all are checked before the first trains
    runs.sort(key=lambda settings: ORDER.index(settings.recipe))
    from triptych.training.loop import train as run

    for number, settings in enumerate(runs, 1):
        label = settings.name or settings.recipe
        typer.echo(
            f"{label}: {settings.steps} updates of {settings.batch} pictures ({number}/{len(runs)})", err=True
        )
        with shown_progress() as watch:
            folder = run(settings, watch)
        typer.echo(f"{label}: weights, log and samples are in {folder}")


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A function to call with every `Progress`: a bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("loss {task.fields[loss]:.4g}"), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(event: Progress) -> None:
            if event.what not in tasks:
                tasks[event.what] = bars.add_task(event.what, total=event.steps, loss=event.loss)
            bars.update(tasks[event.what], completed=event.step, total=event.steps, loss=event.loss)

        yield watch


class Lines:
    """One line on standard error every half minute, with the time left."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = event.step
        if now - self.last < QUIET_SECONDS and event.step != event.steps:
            return
        self.last = now
        left = (now - self.started) / max(event.step - self.first, 1) * (event.steps - event.step)
        print(
            f"{event.what} {event.step}/{event.steps}, loss {event.loss:.4g}, {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
