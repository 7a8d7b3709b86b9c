"""`triptych generate`: text to pictures, or a picture again from the settings it carries."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import CONTROL_HELP, further, saving_hints
from triptych.apps.cli.making import make, requested
from triptych.apps.cli.options import picture_options, split
from triptych.errors import RequestError

HELP = """Make pictures from a prompt, or repeat a picture.

Examples:

  triptych generate "a red apple"

  triptych generate "a blue star" --count 4 --seed 7 --out pictures

  triptych generate "a red apple" --upscale 2

  triptych generate "a house" --control canny=lines.png,weight=0.8 --control palette=colours.png,end=0.5

  triptych generate --like pictures/a-blue-star-7.png
"""


@picture_options()
def generate(
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    upscale: Annotated[
        int | None, Option(help="2: draw Stage C's latents again, twice as large; never through pixels.")
    ] = None,
    control: Annotated[list[str] | None, Option(help=CONTROL_HELP)] = None,
    save_hint: Annotated[
        bool, Option("--save-hint", help="Also write what the ControlNets are told, NAME.hint.png.")
    ] = False,
    **options: Any,
) -> None:
    given, run = split(options)
    if upscale is not None:
        given["upscale"] = upscale
    if prompt is not None:
        given["prompt"] = prompt
    elif run.like is None:
        raise RequestError('A prompt is needed, for example: triptych generate "a red apple".')
    if control:
        from triptych.pipelines.control import steered

        asked, _ = steered("", [further(text) for text in control], {})
        given |= {"sources": asked.sources, "controls": asked.controls}
    make(*requested(given, run.like), run, saving_hints(run.out) if save_hint else None)
