"""`triptych train`: run or continue training from recipe files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Train a part of a cascade from a recipe, or continue a run that stopped.

Running the same command again continues where the last checkpoint was. A folder trains all recipes in it, in
name order; finished ones are skipped.

Examples:

  triptych train recipes/tiny/stage_c.toml --set out=runs/try

  triptych train recipes/mini

  triptych train run.toml --set steps=20000 --set optim.lr=3e-4
"""


def train(
    recipe: Annotated[list[Path], typer.Argument(help="recipe files, or folders of them")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting (repeatable)")
    ] = None,
) -> None:
    from triptych.errors import SettingsError
    from triptych.training.config import read_settings

    files: list[Path] = []
    for path in recipe:
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"{recipe[0]} holds no recipe: expected .toml files.")
    runs = [read_settings(file, set_ or []) for file in files]  # every file is checked before the first trains
    from triptych.training.loop import train as run

    for number, settings in enumerate(runs):
        label = settings.name or settings.recipe
        typer.echo(f"{label}: {settings.recipe}, {settings.steps} updates of {settings.batch} ({number + 1}/{len(runs)})")
        with training_progress() as watch:
            folder = run(settings, watch)
        typer.echo(f"{label}: done, weights and log in {folder}")


def training_progress():  # type: ignore[no-untyped-def]
    """A context whose value shows progress: a bar on a terminal, a line now and then elsewhere."""
    import sys
    import time
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def lines():  # type: ignore[no-untyped-def]
        last = [0.0]

        def watch(event) -> None:  # type: ignore[no-untyped-def]
            if time.monotonic() - last[0] > 30 or event.step == event.steps:
                last[0] = time.monotonic()
                print(f"{event.what} {event.step}/{event.steps} loss {event.loss:.4g}", file=sys.stderr, flush=True)

        yield watch

    @contextmanager
    def bar():  # type: ignore[no-untyped-def]
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4g}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bars: dict[str, int] = {}

            def watch(event) -> None:  # type: ignore[no-untyped-def]
                if event.what not in bars:
                    bars[event.what] = progress.add_task(event.what, total=event.steps, loss=event.loss)
                progress.update(bars[event.what], completed=event.step, total=event.steps, loss=event.loss)

            yield watch

    return bar() if sys.stderr.isatty() else lines()
