"""`triptych decode`: the picture of latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import SAMPLING_C, picture_options, split
from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.pipelines.cascade import Cascade, Event

HELP = """Make the picture of latents that `triptych encode` wrote.

Examples:

  triptych decode photo.safetensors

  triptych decode photo.safetensors --compare photo.png --out pictures

The model is the one that the file names unless --model says otherwise.
"""


@picture_options("count", "size", *SAMPLING_C)
def decode(
    file: Annotated[Path | None, Argument(help="A file of latents.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="A caption for Stage B, if any.", show_default=False)] = None,
    compare: Annotated[Path | None, Option(help="The original picture; tells PSNR and SSIM.")] = None,
    **options: Any,
) -> None:
    from triptych.pipelines.pictures import bring_latents

    given, run = split(options)
    if file is None and run.like is None:
        raise RequestError("A file of latents is needed, for example: triptych decode photo.safetensors.")
    if prompt is not None or run.like is None:
        given["prompt"] = prompt or ""
    if file is not None:
        latents, source = bring_latents(file)
        given = {"model": latents.model, **given, "size": latents.size, "sources": (source,)}

    def measured(cascade: Cascade, event: Event) -> dict[str, Any]:
        from triptych.evaluation.fidelity import fidelity
        from triptych.images import read_picture

        assert event.image is not None
        return {} if compare is None else fidelity(event.image, read_picture(compare))

    make(*requested(given, run.like), run, measure=measured)
