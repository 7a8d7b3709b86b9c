"""`triptych generate`: text to pictures, or a picture again from the settings it carries."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import picture_options, split
from triptych.errors import RequestError

HELP = """Make pictures from a prompt, or repeat a picture.

Examples:

  triptych generate "a red apple"

  triptych generate "a blue star" --count 4 --seed 7 --out pictures

  triptych generate --like pictures/a-blue-star-7.png
"""


@picture_options()
def generate(
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    **options: Any,
) -> None:
    given, run = split(options)
    if prompt is not None:
        given["prompt"] = prompt
    elif run.like is None:
        raise RequestError('A prompt is needed, for example: triptych generate "a red apple".')
    make(*requested(given, run.like), run)
