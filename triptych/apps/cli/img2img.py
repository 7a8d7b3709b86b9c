"""`triptych img2img`: a picture changed towards a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import picture_options, split
from triptych.errors import RequestError

HELP = """Change a picture towards a prompt.

Examples:

  triptych img2img photo.png "as a watercolour"

  triptych img2img photo.png "a winter landscape" --strength 0.8 --count 4

  triptych img2img --like a-winter-landscape-7.png --strength 0.5

The picture's semantic latents are noised as far as --strength says and sampled from there: 0 gives the
picture's reconstruction, 1 what generate draws. The size follows the picture unless --size says otherwise.
"""

DEFAULT_STRENGTH = 0.6


@picture_options()
def img2img(
    photo: Annotated[Path | None, Argument(help="The picture to change.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    strength: Annotated[
        float | None, Option(help=f"From 0, the picture as it is, to 1, nothing of it. [{DEFAULT_STRENGTH}]")
    ] = None,
    **options: Any,
) -> None:
    given, run = split(options)
    if photo is None and run.like is None:
        raise RequestError(
            'A picture is needed, for example: triptych img2img photo.png "as a watercolour" --strength 0.6.'
        )
    if prompt is not None or run.like is None:
        given["prompt"] = prompt or ""
    if strength is not None or run.like is None:
        given["strength"] = DEFAULT_STRENGTH if strength is None else strength
    if photo is not None:
        from triptych.pipelines.pictures import START, bring

        given["sources"] = (bring(photo, START).source,)
    make(*requested(given, run.like), run)
