"""`triptych canny`: a picture with the edges of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import Asked, control_options, steer
from triptych.apps.cli.options import picture_options

HELP = """Make a picture that follows the edges of another, or the lines of a sketch.

Examples:

  triptych canny photo.png "a house in winter"

  triptych canny drawing.png "a house" --sketch --control-weight 0.8

  triptych canny photo.png "a lamp" --low 50 --high 120 --control-end 0.6 --save-hint

Edges are found in a photo by Canny's method; the lines of a sketch (dark on white, or on nothing) are the
edges themselves.
"""


@picture_options()
@control_options
def canny(
    photo: Annotated[Path | None, Argument(help="The picture or sketch.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    sketch: Annotated[
        bool, Option("--sketch", help="The picture is a sketch: its lines are the edges.")
    ] = False,
    low: Annotated[float | None, Option(help="Weaker changes are no edges. [100]")] = None,
    high: Annotated[float | None, Option(help="Stronger changes always are edges. [200]")] = None,
    **options: Any,
) -> None:
    settings = {"sketch": sketch or None, "low": low, "high": high}
    steer(Asked("canny", photo, None, settings), prompt, options)
