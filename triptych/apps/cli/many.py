"""Making the pictures of a whole file of prompts: what is missing, stage by stage, with the time left."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from triptych.apps.cli.doctor import duration
from triptych.apps.cli.making import check_folder, tell
from triptych.apps.cli.options import RunOptions
from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.pipelines.bulk import Progress
    from triptych.pipelines.cascade import Cascade
    from triptych.pipelines.prompt_file import Wanted
    from triptych.pipelines.speed import Speed

WORK_FOLDER = ".triptych-work"  # inside --out; holds what lies between the stages, and goes at the end
MOST_SETTINGS = 4096  # bytes of a picture's settings
LABELS = {"text": "prompts read", "stage_c": "Stage C"}


def make_many(prompts: Path, given: dict[str, Any], run: RunOptions, pipelined: bool) -> None:
    """Make every picture of a prompt file that is not in --out yet.

    `given` are settings for lines that have none of their own. All lines are checked before any picture is
    made. Raises RequestError naming the line that is wrong.
    """
    if run.preview or run.like is not None:
        raise RequestError("--prompts makes many pictures by themselves; leave out --preview and --like.")
    wanted = all_pictures(prompts, given, run.speed())
    total = sum(len(pictures) for _, pictures in wanted)
    left = [(cascade, still_missing(pictures, run.out)) for cascade, pictures in wanted]
    remaining = sum(len(pictures) for _, pictures in left)
    sizes = [one.request.sides() for _, pictures in left for one in pictures]
    check_folder(run.out, sum(height * width * 3 + MOST_SETTINGS for height, width in sizes))
    if not run.json_output:
        done = f", {total - remaining} of them are there" if remaining < total else ""
        typer.echo(f"{total} pictures from {prompts}{done}.")
    saved = []
    for cascade, pictures in left:
        if pictures:
            saved += make_missing(cascade, pictures, run, pipelined)
    if run.json_output:
        typer.echo(
            json.dumps({"pictures": saved, "present": total - remaining}, ensure_ascii=False, indent=2)
        )


def all_pictures(
    prompts: Path, given: dict[str, Any], speed: Speed | None = None
) -> list[tuple[Cascade, list[Wanted]]]:
    """The pictures of all lines by the cascade that makes them."""
    from triptych.pipelines.cascade import IDENTITY, Cascade
    from triptych.pipelines.prompt_file import pictures_of, read_prompt_file

    cascades: dict[tuple[Any, ...], Cascade] = {}
    found: dict[tuple[Any, ...], list[Wanted]] = {}
    for line in read_prompt_file(prompts, given):
        key = tuple(getattr(line.request, name) for name in IDENTITY)
        try:
            if key not in cascades:
                cascades[key] = Cascade.for_request(line.request, speed)
            request = cascades[key].resolve(line.request)
        except RequestError as error:
            raise RequestError(f"{prompts}, line {line.number}: {error}") from None
        found.setdefault(key, []).extend(pictures_of(line.number, request))
    return [(cascades[key], pictures) for key, pictures in found.items()]


def still_missing(wanted: list[Wanted], out: Path) -> list[Wanted]:
    from triptych.pipelines.prompt_file import missing

    return missing(wanted, out)


def make_missing(
    cascade: Cascade, wanted: list[Wanted], run: RunOptions, pipelined: bool
) -> list[dict[str, Any]]:
    """Make pictures and save each when it is there; returns what to tell about them."""
    from triptych.images import save_png
    from triptych.pipelines.bulk import bulk

    work = run.out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    saved: list[dict[str, Any]] = []
    started, stage = time.perf_counter(), ""
    with contextlib.closing(bulk(cascade, wanted, work, pipelined)) as passing:
        for progress in passing:
            if progress.stage != stage:
                started, stage, first = time.perf_counter(), progress.stage, progress.done
            for made in progress.made:
                path = save_png(run.out, made.wanted.stem, made.image, made.metadata)
                picture = made.wanted.picture
                saved.append(
                    {
                        "line": made.wanted.line,
                        "path": str(path),
                        "prompt": picture.prompt,
                        "seed": picture.seed,
                    }
                )
            if not run.json_output:
                show(progress, saved, time.perf_counter() - started, progress.done - first)
    shutil.rmtree(work, ignore_errors=True)
    return saved


def show(progress: Progress, saved: list[dict[str, Any]], seconds: float, since: int) -> None:
    """A line for each finished picture, and for the passing of others through a stage."""
    left = ""
    if since and progress.done < progress.total:
        left = f", {duration(seconds / since * (progress.total - progress.done))} left"
    counted = f"{progress.done}/{progress.total}{left}"
    if progress.made:
        tell({"path": saved[-1]["path"], "seed": saved[-1]["seed"], "done": counted})
    else:
        typer.echo(f"{LABELS.get(progress.stage, progress.stage)}: {counted}")
