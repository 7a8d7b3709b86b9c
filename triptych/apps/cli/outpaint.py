"""`triptych outpaint`: a picture drawn further at its sides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import Asked, Hold, control_options, steer
from triptych.apps.cli.options import picture_options
from triptych.errors import RequestError

HELP = """Draw a picture further at its sides.

Examples:

  triptych outpaint photo.png --left 256 "a meadow"

  triptych outpaint photo.png --left 64 --right 64 --top 32 "a beach" --count 4

The picture itself stays exactly as it is; the result is larger by so many pixels.
"""


@picture_options()
@control_options
def outpaint(
    photo: Annotated[Path | None, Argument(help="The picture.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="What to draw around it.", show_default=False)] = None,
    left: Annotated[int, Option(min=0, help="Pixels to add on the left.")] = 0,
    right: Annotated[int, Option(min=0, help="Pixels to add on the right.")] = 0,
    top: Annotated[int, Option(min=0, help="Pixels to add above.")] = 0,
    bottom: Annotated[int, Option(min=0, help="Pixels to add below.")] = 0,
    hold: Hold = None,
    **options: Any,
) -> None:
    sides = (left, top, right, bottom)
    if photo is not None and not any(sides):
        raise RequestError(
            "Say how far to go on: --left, --right, --top or --bottom with a number of pixels."
        )
    own = {"extend": sides if any(sides) else None, "hold": hold}
    steer(Asked("inpainting", photo, None, own), prompt, options)
