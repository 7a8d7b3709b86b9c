"""What the commands that make pictures do once they have a request: make, save, tell."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from triptych.apps.cli.options import RunOptions
from triptych.apps.cli.progress import stage_progress
from triptych.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from triptych.pipelines.cascade import Cascade, Event
    from triptych.pipelines.inputs import Inputs
    from triptych.pipelines.request import Request

STARTED = time.perf_counter()  # as early as a command can know, so that --json can tell import time

Prepare = Callable[["Cascade", "Request"], "Inputs"]
Measure = Callable[["Cascade", "Event"], dict[str, Any]]


def make(
    request: Request,
    wanted: int | None,
    run: RunOptions,
    prepare: Prepare | None = None,
    measure: Measure | None = None,
) -> None:
    """Make the pictures of a request, save each as soon as it is there, and tell about it.

    `wanted` is the one picture to keep (None: all). `prepare` makes inputs beside the pictures that the
    request names, `measure` adds facts to what is told of a picture.
    """
    from triptych.pipelines.cascade import Cascade
    from triptych.pipelines.inputs import NOTHING

    imported = time.perf_counter() - STARTED
    cascade = Cascade.for_request(request, run.speed())
    request = cascade.resolve(request.replaced(preview=run.preview))
    inputs = NOTHING if prepare is None else prepare(cascade, request)
    events = cascade.stream(request, inputs)
    prepare_folder(run.out, request)
    saved: list[dict[str, Any]] = []
    seconds = {"import": imported, "save": 0.0}
    try:
        with contextlib.closing(events), stage_progress() as show:
            for event in previewed(events, run.out, request) if run.preview else events:
                show(event)
                if event.image is not None and wanted in (None, event.pictures[event.step - 1].index):
                    start = time.perf_counter()
                    facts = save(event, run.out, request)
                    if measure is not None:
                        facts |= measure(cascade, event)
                    saved.append(facts)
                    seconds["save"] += time.perf_counter() - start
                    if not run.json_output:
                        tell(facts)
    finally:
        if saved:
            seconds.update(cascade.parts.timings)
            seconds["total"] = time.perf_counter() - STARTED
            report(saved, request, seconds, run.json_output)


def requested(given: dict[str, Any], like: Path | None) -> tuple[Request, int | None]:
    """The request, and the one picture of it that is wanted (None: all).

    Without further options --like repeats the whole batch that the picture was made in, because the last
    bit depends on it; with any option it starts from the picture's own prompt and seed.
    """
    from triptych.images import read_metadata
    from triptych.pipelines.request import Request, recall

    if like is None:
        return Request(**given), None
    request, picture = recall(read_metadata(like), like)
    if not given:
        return request, picture.index
    alone = {"prompt": picture.prompt, "seed": picture.seed, "seeds": None, "count": 1}
    return request.replaced(**{**alone, **given}), None


def prepare_folder(out: Path, request: Request) -> None:
    """Make the folder and try it, so that hours of work do not end at a closed door."""
    width, height = request.size or (0, 0)
    check_folder(out, (width * height * 3 + 4096) * len(request.pictures()))


def check_folder(out: Path, needed: int) -> None:
    """Make the folder unless it is there; raises unless `needed` bytes can be written into it."""
    from triptych.pipelines.capacity import gigabytes

    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out, prefix=".triptych-"):
        pass
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CapacityError(
            f"The disk is nearly full: {out} has room for {gigabytes(free)} and the pictures may need "
            f"{gigabytes(needed)}. Free some space or choose another --out."
        )


def save(event: Event, out: Path, request: Request) -> dict[str, Any]:
    """Write the finished picture of an event; returns what to tell about it."""
    from triptych.images import save_png

    picture = event.pictures[event.step - 1]
    assert event.image is not None
    path = save_png(out, stem(picture.prompt, picture.seed, request), event.image, event.metadata)
    return {"path": str(path), "prompt": picture.prompt, "seed": picture.seed}


def stem(prompt: str, seed: int, request: Request) -> str:
    """A name after the prompt, or without one after the picture that was brought."""
    from triptych.images import picture_stem

    files = [source.file for source in request.sources if source.file is not None]
    return picture_stem(prompt or (Path(files[0]).stem if files else ""), seed)


def tell(facts: dict[str, Any]) -> None:
    """One line about a saved picture: its path, its seed, and what was measured of it."""
    rest = {name: value for name, value in facts.items() if name not in ("path", "prompt")}
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in rest.items()
    )
    typer.echo("  ".join([facts["path"], *shown]))


def previewed(events: Iterator[Event], out: Path, request: Request) -> Iterator[Event]:
    """Pass events on, keeping one preview file per batch up to date; its path goes to standard error."""
    from triptych.images import encode_jpeg, grid, replace, write_new

    path = None
    for event in events:
        if event.previews:
            content = encode_jpeg(grid(event.previews))
            first = event.pictures[0]
            if path is None or event.step == 1:
                path = write_new(out, f"{stem(first.prompt, first.seed, request)}.preview", ".jpg", content)
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
    settings["controls"] = ", ".join(
        f"{c.hint} (weight {c.weight:g}, from {c.begin:g} to {c.end:g})" for c in request.controls
    )
    settings["sources"] = ", ".join(f"{s.file} ({s.role}, weight {s.weight:g})" for s in request.sources)
    typer.echo("  ".join(f"{key} {value}" for key, value in settings.items() if value not in ("", False, [])))
    typer.echo(f"{rounded['total']} s")
