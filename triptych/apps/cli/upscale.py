"""`triptych upscale`: a picture drawn larger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import Asked, control_options, steer
from triptych.apps.cli.options import picture_options
from triptych.errors import RequestError

HELP = """Draw a picture two or four times as large.

Examples:

  triptych upscale photo.png

  triptych upscale icon.png "a red apple" --factor 4 --out large

2 works from the picture's semantic latents, 4 from its pixels. What generate draws is upscaled without pixels
in between by `triptych generate "..." --upscale 2`.
"""

KINDS = {2: "super_resolution", 4: "pixel_super_resolution"}


@picture_options()
@control_options
def upscale(
    photo: Annotated[Path | None, Argument(help="The picture.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="What it shows, if you like.", show_default=False)] = None,
    factor: Annotated[int, Option(help="How many times as wide and high: 2 or 4.")] = 2,
    **options: Any,
) -> None:
    if factor not in KINDS:
        raise RequestError(f"Pictures are made 2 or 4 times as large; --factor {factor} was given.")
    steer(Asked(KINDS[factor], photo, None, {}), prompt, options)
