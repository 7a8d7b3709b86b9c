"""`triptych reconstruct`: a picture through the latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import SAMPLING_C, picture_options, split
from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.pipelines.cascade import Cascade, Event

HELP = """Pass a picture through the semantic latents and back, and say what that loses.

Examples:

  triptych reconstruct photo.png

  triptych reconstruct photo.jpg --size 512x512 --out pictures --json

Told are the compression (how many times fewer numbers the latents have, and how many times shorter each side
is), and PSNR (decibels) and SSIM (1 is equal) against the picture at the same size.
"""


@picture_options("count", *SAMPLING_C)
def reconstruct(
    photo: Annotated[Path | None, Argument(help="The picture.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="A caption for Stage B, if any.", show_default=False)] = None,
    **options: Any,
) -> None:
    from triptych.pipelines.pictures import START, bring

    given, run = split(options)
    if photo is None and run.like is None:
        raise RequestError("A picture is needed, for example: triptych reconstruct photo.png.")
    if prompt is not None or run.like is None:
        given["prompt"] = prompt or ""
    if photo is not None:
        given |= {"sources": (bring(photo, START).source,), "strength": 0.0}
    make(*requested(given, run.like), run, measure=measured)


def measured(cascade: Cascade, event: Event) -> dict[str, Any]:
    """How near a reconstruction came, and how small the picture was in between."""
    from triptych.evaluation.fidelity import compression, fidelity
    from triptych.pipelines.pictures import bring_again
    from triptych.pipelines.request import recall

    assert event.image is not None
    assert event.metadata is not None
    request, _ = recall(event.metadata, "this picture")
    (original,) = bring_again(request)
    height, width = request.sides()
    rows, columns = cascade.parts.size_c(height, width)
    facts = compression(event.image.size, (1, 16, rows, columns))
    return facts | fidelity(event.image, original.image)
