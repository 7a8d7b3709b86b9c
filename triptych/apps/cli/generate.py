"""`triptych generate`: text to pictures, or a picture again from the settings it carries."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from triptych.apps.cli.progress import stage_progress
from triptych.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from triptych.pipelines.cascade import Event
    from triptych.pipelines.request import Request

HELP = """Make pictures from a prompt, or repeat a picture.

Examples:

  triptych generate "a red apple"

  triptych generate "a blue star" --count 4 --seed 7 --out pictures

  triptych generate --like pictures/a-blue-star-7.png
"""

STARTED = time.perf_counter()  # as early as this command can know, so that --json can tell import time
RUN_OPTIONS = ("like", "out", "json_output", "preview")


def generate(
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    count: Annotated[int | None, Option(help="Number of pictures; picture i has seed + i. [1]")] = None,
    size: Annotated[str | None, Option(help="Width x height in pixels, such as 256x256.")] = None,
    negative: Annotated[str | None, Option(help="What to steer away from.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the first picture; drawn when not given.")] = None,
    steps: Annotated[int | None, Option(help="Steps of Stage C, which decides what is drawn.")] = None,
    guidance: Annotated[
        float | None, Option(help="How strongly Stage C follows the prompt; 1 is off.")
    ] = None,
    decoder_steps: Annotated[int | None, Option(help="Steps of Stage B, which draws the detail.")] = None,
    decoder_guidance: Annotated[float | None, Option(help="Guidance of Stage B; 1 is off.")] = None,
    sampler: Annotated[str | None, Option(help="ddpm, ddim, euler, dpmpp_2m or lcm, for Stage C.")] = None,
    decoder_sampler: Annotated[str | None, Option(help="The same for Stage B.")] = None,
    out: Annotated[Path, Option(help="Folder for the pictures; made when it is not there.")] = Path("."),
    model: Annotated[
        str | None, Option(help="mini, cascade, cascade-lite, a hub name or a folder. [mini]")
    ] = None,
    stage_c: Annotated[str | None, Option(help="Another Stage C: 3.6b, 1b or a file.")] = None,
    stage_b: Annotated[str | None, Option(help="Another Stage B: 1.5b, 700m or a file.")] = None,
    stage_a: Annotated[str | None, Option(help="Another Stage A: a file.")] = None,
    text_encoder: Annotated[str | None, Option(help="Another text tower: a file or folder.")] = None,
    device: Annotated[str | None, Option(help="auto, cuda, cuda:1, mps or cpu. [auto]")] = None,
    dtype: Annotated[str | None, Option(help="auto, float32, bfloat16 or float16. [auto]")] = None,
    low_memory: Annotated[
        bool, Option("--low-memory", help="One stage at a time, weights left on disk.")
    ] = False,
    batch: Annotated[int | None, Option(help="Pictures that share a network call. [up to 4]")] = None,
    like: Annotated[Path | None, Option(help="Repeat this picture; other options change one thing.")] = None,
    preview: Annotated[
        bool, Option("--preview", help="Keep NAME.preview.jpg up to date while Stage C runs.")
    ] = False,
    json_output: Annotated[
        bool, Option("--json", help="Print JSON alone: pictures, settings, timings.")
    ] = False,
) -> None:
    given = {
        name: value
        for name, value in locals().items()
        if name not in RUN_OPTIONS and value is not None and value is not False
    }
    from triptych.pipelines.cascade import Cascade

    imported = time.perf_counter() - STARTED
    request, wanted = requested(given, like)
    cascade = Cascade.for_request(request)
    request = cascade.resolve(request.replaced(preview=preview))
    events = cascade.stream(request)
    prepare_folder(out, request)
    saved: list[dict[str, Any]] = []
    seconds = {"import": imported, "save": 0.0}
    try:
        with contextlib.closing(events), stage_progress() as show:
            for event in previewed(events, out) if preview else events:
                show(event)
                if event.image is not None and wanted in (None, event.pictures[event.step - 1].index):
                    start = time.perf_counter()
                    saved.append(save(event, out))
                    seconds["save"] += time.perf_counter() - start
                    if not json_output:
                        typer.echo(f"{saved[-1]['path']}  seed {saved[-1]['seed']}")
    finally:
        if saved:
            seconds.update(cascade.parts.timings)
            seconds["total"] = time.perf_counter() - STARTED
            report(saved, request, seconds, json_output)


def requested(given: dict[str, Any], like: Path | None) -> tuple[Request, int | None]:
    """The request, and the one picture of it that is wanted (None: all).

    Without further options --like repeats the whole batch that the picture was made in, because the last
    bit depends on it; with any option it starts from the picture's own prompt and seed.
    """
    from triptych.images import read_metadata
    from triptych.pipelines.request import Request, recall

    if like is None:
        if "prompt" not in given:
            raise RequestError('A prompt is needed, for example: triptych generate "a red apple".')
        return Request(**given), None
    request, picture = recall(read_metadata(like), like)
    if not given:
        return request, picture.index
    alone = {"prompt": picture.prompt, "seed": picture.seed, "seeds": None, "count": 1}
    return request.replaced(**{**alone, **given}), None


def prepare_folder(out: Path, request: Request) -> None:
    """Make the folder and try it, so that hours of work do not end at a closed door."""
    from triptych.pipelines.capacity import gigabytes

    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out, prefix=".triptych-"):
        pass
    width, height = request.size or (0, 0)
    needed = (width * height * 3 + 4096) * len(request.pictures())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CapacityError(
            f"The disk is nearly full: {out} has room for {gigabytes(free)} and the pictures may need "
            f"{gigabytes(needed)}. Free some space or choose another --out."
        )


def save(event: Event, out: Path) -> dict[str, Any]:
    """Write the finished picture of an event; returns what to tell about it."""
    from triptych.images import picture_stem, save_png

    picture = event.pictures[event.step - 1]
    assert event.image is not None
    path = save_png(out, picture_stem(picture.prompt, picture.seed), event.image, event.metadata)
    return {"path": str(path), "prompt": picture.prompt, "seed": picture.seed}


def previewed(events: Iterator[Event], out: Path) -> Iterator[Event]:
    """Pass events on, keeping one preview file per batch up to date; its path goes to standard error."""
    from triptych.images import encode_jpeg, grid, picture_stem, replace, write_new

    path = None
    for event in events:
        if event.previews:
            content = encode_jpeg(grid(event.previews))
            first = event.pictures[0]
            if path is None or event.step == 1:
                path = write_new(out, f"{picture_stem(first.prompt, first.seed)}.preview", ".jpg", content)
                print(f"Preview: {path}", file=sys.stderr)
            else:
                replace(path, content)
        yield event


def report(saved: list[dict[str, Any]], request: Request, seconds: dict[str, float], as_json: bool) -> None:
    """Print what was made and with which settings."""
    settings = {key: value for key, value in request.model_dump(mode="json").items() if value is not None}
    rounded = {stage: round(value, 3) for stage, value in seconds.items()}
    if as_json:
        content = {"pictures": saved, "request": settings, "timings": rounded}
        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
        return
    width, height = request.size or (0, 0)
    settings["size"] = f"{width}x{height}"
    for key in ("prompt", "count", "seeds"):
        settings.pop(key, None)
    typer.echo("  ".join(f"{key} {value}" for key, value in settings.items() if value not in ("", False)))
    typer.echo(f"{rounded['total']} s")
