"""`triptych train`: run or continue training from recipe files."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from triptych.training.config import RunSettings
    from triptych.training.loop import Progress

HELP = """Train a part of a cascade from a recipe, or continue a run that stopped.

Running the same command again continues where the last checkpoint was; Ctrl-C and SIGTERM save first. A
folder trains all recipes in it, in the order of their needs; finished ones are skipped.

Examples:

  triptych train recipes/tiny/stage_c.toml --set out=runs/try

  triptych train recipes/mini

  triptych train run.toml --set steps=20000 --set optim.lr=3e-4

  triptych train --recipe lora --data my_pictures --name mydog

  torchrun --nproc-per-node 8 -m triptych train run.toml
"""

ORDER = (
    "stage_a",
    "semantic",
    "image_encoder",
    "stage_b",
    "stage_c",
    "lora",
    "controlnet",
)  # B and C need the others' weights
QUIET_SECONDS = 30.0  # between two lines where there is no terminal
WORTH_SAYING = 3.0  # how much faster products must be in bfloat16; what is not a product stays as it is


def train(
    recipes: Annotated[
        list[Path] | None, typer.Argument(metavar="RECIPE...", help="recipe files, or folders of them")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="a recipe that comes with the package, in place of a file: lora")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="a folder or tar shard of pictures, for --recipe; repeatable")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="what is taught: [NAME] in prompts, and NAME.safetensors", metavar="NAME"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model that is taught, for --recipe")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="say what memory it will take, and do not train")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting (repeatable)")
    ] = None,
) -> None:
    """See HELP."""
    from triptych.errors import SettingsError
    from triptych.training.config import read_settings, shipped_recipe

    files = [file for path in recipes or [] for file in recipe_files(path)]
    given = list(changes or [])
    if recipe is not None:
        files, given = [shipped_recipe(recipe)], [*shorthand(recipe, data, name, model), *given]
    elif data or name or model:
        raise SettingsError(
            "--data, --name and --model go with --recipe; in a file, use --set data.shards=..."
        )
    if not files:
        raise SettingsError("There is no recipe: name a .toml file, a folder of them, or --recipe lora.")
    runs = [read_settings(file, given) for file in files]  # all are checked before the first trains
    runs.sort(key=lambda settings: ORDER.index(settings.recipe))
    if plan:
        from triptych.training.plan import plan_memory, show_plan

        for settings in runs:
            typer.echo(f"{settings.name or settings.recipe}, at the fullest moment of a step:")
            typer.echo(show_plan(plan_memory(settings)))
        return
    from triptych.training.loop import train as run
    from triptych.training.stopping import stop_on_signals

    echo = typer.echo if os.environ.get("RANK", "0") == "0" else lambda *text, **options: None
    for number, settings in enumerate(runs, 1):
        label = settings.name or settings.recipe
        echo(
            f"{label}: {settings.steps} updates of {settings.batch} pictures ({number}/{len(runs)})", err=True
        )
        if os.environ.get("RANK", "0") == "0":
            tell_plan(settings)
            tell_precision(settings)
        try:
            with stop_on_signals() as stop, shown_progress() as watch:
                folder = run(settings, watch, stop)
        except KeyboardInterrupt:  # while nothing was trained, or asked a second time
            echo(f"{label}: stopped; what was saved is in {settings.out}. {how_to_continue()}")
            return
        if stop.step is not None:
            echo(f"{label}: saved at step {stop.step} in {folder}. {how_to_continue()}")
            return
        echo(f"{label}: weights, log and samples are in {folder}")
        if os.environ.get("RANK", "0") != "0":
            continue
        tell_skipped(folder)
        if settings.recipe == "lora" and settings.lora.check and settings.lora.token:
            tell_taught(folder, settings)
        if recipe is not None and settings.recipe == "lora":
            hand_over(folder, settings.name)


def tell_plan(settings: RunSettings) -> None:
    """The memory that the run is expected to take and its two largest parts, in one line."""
    from triptych.errors import TriptychError
    from triptych.training.plan import plan_memory

    try:
        plan = plan_memory(settings)
    except TriptychError:  # the run itself says what is wrong
        return
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])[:2]
    told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in largest)
    typer.echo(f"Expected memory: {plan.total / 2**30:.2f} GiB ({told}); --plan shows all parts", err=True)


def tell_precision(settings: RunSettings) -> None:
    """That this machine would train much faster in bfloat16, where it would. The setting is not changed by
    itself: a run must not depend on the machine it is begun on."""
    from triptych.errors import TriptychError
    from triptych.pipelines.placement import bfloat16_gain, choose_device

    if settings.precision != "float32":
        return
    try:
        gain = bfloat16_gain(choose_device(settings.device))
    except TriptychError:  # the run itself says what is wrong
        return
    if gain >= WORTH_SAYING:
        typer.echo(
            f"Products of matrices are {gain:.0f} times faster in bfloat16 here: --set precision=bfloat16 "
            "uses that",
            err=True,
        )


def recipe_files(path: Path) -> list[Path]:
    """The file itself, or all recipes of a folder, which may hold files of other commands too (a study)."""
    from triptych.training.config import read_toml

    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("*.toml")) if "recipe" in read_toml(file)]


def shorthand(recipe: str, data: list[Path] | None, name: str | None, model: str | None) -> list[str]:
    """The settings that --data, --name and --model stand for."""
    from triptych.errors import SettingsError

    if not data or not name:
        raise SettingsError(
            f"--recipe {recipe} needs --data, a folder of pictures, and --name, what they are to be called."
        )
    shards = ", ".join(json.dumps(str(path)) for path in data)
    given = [f"data.shards=[{shards}]", f"name={json.dumps(name)}", f"out={json.dumps(f'runs/{name}')}"]
    return [*given, f"{recipe}.model={json.dumps(model)}"] if model else given


def how_to_continue() -> str:
    """The command that takes the run up again: the one that was given."""
    import shlex

    given = shlex.join(sys.argv[1:])
    machines = int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return f"Continue with: triptych {given}"
    nodes = f" --nnodes {machines}" if machines > 1 else ""
    count = os.environ["LOCAL_WORLD_SIZE"]
    return f"Continue with: torchrun --nproc-per-node {count}{nodes} -m triptych {given} (or other numbers)"


def tell_skipped(folder: Path) -> None:
    """Say how many pictures could not be read, if there were any."""
    listed = folder / "skipped.txt"
    if listed.exists():
        lines = listed.read_text(encoding="utf-8").splitlines()
        first = f"{lines[0]} and {len(lines) - 1} more" if len(lines) > 1 else lines[0]
        typer.echo(f"{len(lines)} samples could not be read: {first}; all are in {listed}", err=True)


def tell_taught(folder: Path, settings: RunSettings) -> None:
    """Draw with and without the token, say how they compare, and put it into the report."""
    from triptych.evaluation.taught import measure_taught, taught_pictures
    from triptych.images import grid
    from triptych.pipelines.cascade import Cascade
    from triptych.training.report import TAUGHT, write_report

    cascade = Cascade.load(settings.lora.model, device=settings.device)
    if cascade.files.image_encoder is None or not settings.data.shards:
        return
    typer.echo("Drawing with and without the token, to see what was taught...", err=True)
    found = measure_taught(
        cascade, str(folder / f"{settings.name}.safetensors"), f"[{settings.name}]", settings.lora.word,
        taught_pictures(settings.data.shards), seeds=settings.lora.check,
    )  # fmt: skip
    (folder / TAUGHT).mkdir(exist_ok=True)
    for name, images in found.shown.items():
        grid(images, columns=8).save(folder / TAUGHT / f"{name}.png")
    numbers = {"near_with": found.near_with, "near_without": found.near_without, "moved": found.moved}
    (folder / TAUGHT / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
    left_out = folder / "skipped.txt"
    write_report(folder, settings, left_out.read_text("utf-8").splitlines() if left_out.exists() else ())
    typer.echo(
        f"Cosine to the taught pictures: {found.near_with:.3f} with [{settings.name}], "
        f"{found.near_without:.3f} without. Other prompts moved by {found.moved:.3f}."
    )


def hand_over(folder: Path, name: str) -> None:
    """Copy the finished file to the current folder and show how it is used."""
    import shutil

    target = Path(f"{name}.safetensors")
    shutil.copyfile(folder / target, target)
    typer.echo(f'Try: triptych generate "a picture of [{name}]" --lora {target}')


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
    """One line on standard error every half minute, with the time left of what goes on."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.what, self.first = "", 0

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        if event.what != self.what:
            self.what, self.first, self.started = event.what, event.step, now
        if now - self.last < QUIET_SECONDS and event.step != event.steps:
            return
        self.last = now
        left = (now - self.started) / max(event.step - self.first, 1) * (event.steps - event.step)
        print(
            f"{event.what} {event.step}/{event.steps}, loss {event.loss:.4g}, {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
