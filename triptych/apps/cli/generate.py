"""`triptych generate`: text to pictures, or a picture again from the settings it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import CONTROL_HELP, further, saving_hints
from triptych.apps.cli.making import make, requested
from triptych.apps.cli.many import make_many
from triptych.apps.cli.options import picture_options, split
from triptych.errors import RequestError

HELP = """Make pictures from a prompt, or repeat a picture.

Examples:

  triptych generate "a red apple"

  triptych generate "a blue star" --count 4 --seed 7 --out pictures

  triptych generate "a red apple" --upscale 2

  triptych generate "a house" --control canny=lines.png,weight=0.8 --control palette=colours.png,end=0.5

  triptych generate --like pictures/a-blue-star-7.png

  triptych generate --prompts prompts.txt --out pictures

A file of prompts has one on each line, or, if its name ends in .jsonl, a JSON object with any setting:
{"prompt": "a red apple", "size": "256x384", "seed": 7, "count": 2}. Options hold for lines that do not say
otherwise; seeds begin at 0. Run again, it makes what is missing.
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
    prompts: Annotated[Path | None, Option(help="Make the pictures of a file of prompts.")] = None,
    pipelined: Annotated[
        bool, Option("--pipelined", help="With --prompts: Stage B works while Stage C makes the next batch.")
    ] = False,
    **options: Any,
) -> None:
    given, run = split(options)
    if upscale is not None:
        given["upscale"] = upscale
    if prompt is not None:
        given["prompt"] = prompt
    elif run.like is None and prompts is None:
        raise RequestError('A prompt is needed, for example: triptych generate "a red apple".')
    if control:
        from triptych.pipelines.control import steered

        asked, _ = steered("", [further(text) for text in control], {})
        given |= {"sources": asked.sources, "controls": asked.controls}
    if prompts is not None:
        if prompt is not None or save_hint:
            raise RequestError("--prompts takes prompts from a file; leave out the prompt and --save-hint.")
        make_many(prompts, given, run, pipelined)
        return
    make(*requested(given, run.like), run, saving_hints(run.out) if save_hint else None)
