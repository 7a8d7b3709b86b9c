"""`triptych inpaint`: a part of a picture drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import Asked, Hold, control_options, parsed_box, steer
from triptych.apps.cli.options import picture_options
from triptych.errors import RequestError

HELP = """Draw a part of a picture anew.

Examples:

  triptych inpaint photo.png --mask mask.png "a hat"

  triptych inpaint photo.png --box 40,60,100,80 "a red ball" --count 4

  triptych inpaint photo.png --salient "a cat" --save-hint

The part is the white of a mask, a box, or what stands out in the picture. Everything outside stays exactly as
it is, and so does the picture's size.
"""


@picture_options()
@control_options
def inpaint(
    photo: Annotated[Path | None, Argument(help="The picture.", show_default=False)] = None,
    prompt: Annotated[
        str | None, Argument(help="What to draw there, taken literally.", show_default=False)
    ] = None,
    mask: Annotated[Path | None, Option(help="A picture that is white where to draw.")] = None,
    box: Annotated[str | None, Option(help="Where to draw: x,y,width,height in pixels.")] = None,
    salient: Annotated[bool, Option("--salient", help="Draw where the picture stands out.")] = False,
    threshold: Annotated[
        float | None, Option(help="With --salient: how much, from 0 to 1; more makes the part smaller. [0.2]")
    ] = None,
    hold: Hold = None,
    **options: Any,
) -> None:
    chosen = sum((mask is not None, box is not None, salient))
    if photo is not None and chosen != 1:
        raise RequestError(
            "Say in one way what to draw anew: --mask FILE, --box x,y,width,height or --salient; "
            f"{chosen or 'none'} of them was given."
        )
    level = (0.2 if threshold is None else threshold) if salient else None
    own = {"box": parsed_box(box), "salient": level, "hold": hold}
    steer(Asked("inpainting", photo, mask, own), prompt, options)
