"""`triptych vary`: new pictures of what a picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import picture_options, split
from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.pipelines.request import Source

HELP = """Make new pictures of what a picture shows, with or without a prompt.

Examples:

  triptych vary photo.png --count 4

  triptych vary photo.png "in the snow" --image-weight 0.7

  triptych vary cat.png --reference hat.png:0.5

  triptych vary --like photo-7.png --steps 30

The picture is told to Stage C as the embedding of the model's image tower; nothing of its layout is kept. A
weight below 1 gives the prompt more say, 0 leaves the picture out.
"""


@picture_options()
def vary(
    photo: Annotated[Path | None, Argument(help="The picture to vary.", show_default=False)] = None,
    prompt: Annotated[
        str | None, Argument(help="What else to draw, taken literally.", show_default=False)
    ] = None,
    image_weight: Annotated[float | None, Option(help="How much the picture counts, from 0 up. [1]")] = None,
    reference: Annotated[
        list[str] | None, Option(help="Another picture, as FILE or FILE:WEIGHT; repeatable.")
    ] = None,
    **options: Any,
) -> None:
    given, run = split(options)
    if photo is None and run.like is None:
        raise RequestError("A picture is needed, for example: triptych vary photo.png --count 4.")
    if prompt is not None or run.like is None:
        given["prompt"] = prompt or ""
    if photo is not None or image_weight is not None or reference:
        given["sources"] = references(photo, image_weight, reference or [], run.like)
    make(*requested(given, run.like), run)


def references(
    photo: Path | None, weight: float | None, others: list[str], like: Path | None
) -> tuple[Source, ...]:
    """The pictures to follow; those of the picture to repeat stay where no others are named."""
    from triptych.pipelines.pictures import REFERENCE, bring

    stored = requested({}, like)[0].sources if like is not None else ()
    if photo is not None:
        first: tuple[Source, ...] = (bring(photo, REFERENCE, 1.0 if weight is None else weight).source,)
    else:
        first = tuple(s if weight is None else bring(s.file or "", s.role, weight).source for s in stored[:1])
    if not others:
        return first + stored[1:]
    return first + tuple(bring(*parsed(text)).source for text in others)


def parsed(text: str) -> tuple[str, str, float]:
    """File, role and weight of FILE or FILE:WEIGHT."""
    from triptych.pipelines.pictures import REFERENCE

    file, colon, tail = text.rpartition(":")
    try:
        return (file, REFERENCE, float(tail)) if colon else (text, REFERENCE, 1.0)
    except ValueError:  # a colon of the file's own name
        return text, REFERENCE, 1.0
