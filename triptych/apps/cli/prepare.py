"""`triptych prepare`: pictures from anywhere into shards that training reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from triptych.conditioning.masks import Saliency

HELP = """Make training data from a folder of pictures, WebDataset tars, or a dataset of the Hugging Face hub.

A folder may lie behind a URL (s3://, gs://, hf://). Captions are KEY.txt beside a picture, metadata.jsonl,
the txt and json of a tar, or a column called text, caption or prompt; pictures without one are fine.
KEY-mask.png is a mask, white where a picture matters. Every picture that is left out is listed with the
reason.

Examples:

  triptych prepare my_pictures data

  triptych prepare shards data --size 1024

  triptych prepare owner/dataset data --split train --caption "a drawing"

  triptych prepare s3://bucket/pictures data --crop smart
"""
SHOWN = 5  # skipped pictures that are named on the terminal
QUIET_EVERY = 1000  # pictures between two lines where there is no terminal


def prepare(
    source: Annotated[
        str, Argument(help="A folder, a tar, a folder of tars, a dataset's name, or a URL.", metavar="SOURCE")
    ],
    out: Annotated[Path, Argument(help="Folder for the shards.", metavar="OUT")],
    size: Annotated[int, Option(min=64, help="Canvases have the area of a square of this side.")] = 1024,
    square: Annotated[bool, Option("--square", help="One square canvas, no other aspect ratios.")] = False,
    caption: Annotated[str, Option(help="Caption of pictures that have none.")] = "",
    min_side: Annotated[int, Option(min=1, help="Leave out pictures smaller than this.")] = 64,
    split: Annotated[str, Option(help="Which part of a hub dataset.")] = "train",
    crop: Annotated[
        str, Option(help="centre, or smart: training crops around what stands out in a picture.")
    ] = "centre",
    saliency: Annotated[
        Path | None, Option(help="The published saliency network, for --crop smart; else contrast decides.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Write OUT anew if it was prepared before.")] = False,
) -> None:
    """See HELP."""
    from triptych.data.buckets import RATIOS
    from triptych.errors import SettingsError
    from triptych.training.prepare import prepare as run

    if crop not in ("centre", "smart") or (saliency is not None and crop != "smart"):
        raise SettingsError(f"--crop {crop}: it is centre or smart, and --saliency goes with smart.")
    ratios = (1.0,) if square else RATIOS
    with shown_progress() as progress:
        made = run(
            source, out, size=size, ratios=ratios, caption=caption, min_side=min_side, split=split,
            look=looking(saliency) if crop == "smart" else None, force=force, progress=progress,
        )  # fmt: skip
    shards = "1 shard" if len(made.shards) == 1 else f"{len(made.shards)} shards"
    typer.echo(f"{out}: {made.pictures} pictures in {shards}, {made.without_caption} without a caption")
    typer.echo("  ".join(f"{canvas}: {count}" for canvas, count in made.buckets.most_common(6)))
    if made.skipped:
        typer.echo(f"{len(made.skipped)} left out, all listed in {out / 'skipped.txt'}:")
        for key, reason in made.skipped[:SHOWN]:
            typer.echo(f"  {key}: {reason}")


def looking(file: Path | None) -> Saliency:
    """How what stands out is found: the network of `file`, or contrast with the rim of a picture."""
    import torch

    from triptych.conditioning.masks import contrast_saliency
    from triptych.training.encoders import frozen

    return contrast_saliency if file is None else frozen("saliency", str(file), torch.device("cpu"))


@contextmanager
def shown_progress() -> Iterator[Callable[[int, int | None], None]]:
    """A function to tell how many pictures were looked at: a bar on a terminal, a line now and then else."""
    if not sys.stderr.isatty():

        def say(done: int, of: int | None) -> None:
            if done % QUIET_EVERY == 0:
                print(f"{done}{f' of {of}' if of else ''} pictures", file=sys.stderr)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("pictures", total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)
