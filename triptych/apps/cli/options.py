"""The options that every command which makes pictures has, written once.

`picture_options` is a decorator: a command that takes `**options` gets them behind its own. `split` parts
what was typed into settings of the request and what concerns the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

if TYPE_CHECKING:
    from triptych.pipelines.speed import Speed


def _options(
    count: Annotated[int | None, Option(help="Number of pictures; picture i has seed + i. [1]")] = None,
    size: Annotated[str | None, Option(help="Width x height in pixels, such as 256x256.")] = None,
    negative: Annotated[str | None, Option(help="What to steer away from.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the first picture; drawn when not given.")] = None,
    steps: Annotated[int | None, Option(help="Steps of Stage C, which decides what is drawn.")] = None,
    guidance: Annotated[
        float | None, Option(help="How strongly Stage C follows the prompt; 1 is off.")
    ] = None,
    decoder_steps: Annotated[int | None, Option(help="Steps of Stage B, which draws the detail.")] = None,
    decoder_guidance: Annotated[float | None, Option(help="Guidance of Stage B; 1 is off.")] = None,
    sampler: Annotated[str | None, Option(help="ddpm, ddim, euler, dpmpp_2m or lcm, for Stage C.")] = None,
    decoder_sampler: Annotated[str | None, Option(help="The same for Stage B.")] = None,
    fast: Annotated[
        bool, Option("--fast", help="Much less work for nearly the same picture; other options win over it.")
    ] = False,
    guidance_interval: Annotated[
        str | None, Option(help="Guide at noise levels between two, such as 0.2-0.9. [0-1]")
    ] = None,
    guidance_agreement: Annotated[
        float | None, Option(help="Guide no more once branches differ by less, such as 0.05. [0]")
    ] = None,
    reuse: Annotated[
        int | None, Option(help="Stage C's deep levels only at every so many-th step. [1]")
    ] = None,
    decoder_reuse: Annotated[int | None, Option(help="The same for Stage B.")] = None,
    draft: Annotated[
        bool, Option("--draft", help="Leave out Stages B and A: the preview, enlarged and blurred.")
    ] = False,
    out: Annotated[Path, Option(help="Folder for the pictures; made when it is not there.")] = Path("."),
    model: Annotated[
        str | None, Option(help="mini, cascade, cascade-lite, a hub name or a folder. [mini]")
    ] = None,
    stage_c: Annotated[str | None, Option(help="Another Stage C: 3.6b, 1b or a file.")] = None,
    stage_b: Annotated[str | None, Option(help="Another Stage B: 1.5b, 700m or a file.")] = None,
    stage_a: Annotated[str | None, Option(help="Another Stage A: a file.")] = None,
    text_encoder: Annotated[str | None, Option(help="Another text tower: a file or folder.")] = None,
    lora: Annotated[
        list[str] | None,
        Option(metavar="FILE[:SCALE]", help="Wear a LoRA, at a scale if given; may be repeated."),
    ] = None,
    device: Annotated[str | None, Option(help="auto, cuda, cuda:1, mps or cpu. [auto]")] = None,
    dtype: Annotated[str | None, Option(help="auto, float32, bfloat16 or float16. [auto]")] = None,
    low_memory: Annotated[
        bool, Option("--low-memory", help="One stage at a time, weights left on disk.")
    ] = False,
    max_memory: Annotated[
        str | None, Option(help="Memory to stay within, such as 8GiB; graphics memory where there is a card.")
    ] = None,
    int8: Annotated[bool, Option("--int8", help="Round the weights of Stages B and C to 8 bits.")] = False,
    compile: Annotated[
        bool, Option("--compile", help="Run blocks under torch.compile; the first picture takes minutes.")
    ] = False,
    batch: Annotated[int | None, Option(help="Pictures that share a network call. [up to 4]")] = None,
    like: Annotated[Path | None, Option(help="Repeat this picture; other options change one thing.")] = None,
    preview: Annotated[
        bool, Option("--preview", help="Keep NAME.preview.jpg up to date while Stage C runs.")
    ] = False,
    json_output: Annotated[
        bool, Option("--json", help="Print JSON alone: pictures, settings, timings.")
    ] = False,
) -> None:
    """Only the signature is used."""


SAMPLING_C = (
    "negative",
    "steps",
    "guidance",
    "sampler",
    "guidance_interval",
    "guidance_agreement",
    "reuse",
    "preview",
)  # of no use where Stage C does not run


@dataclass(frozen=True)
class RunOptions:
    """What concerns the run and not the request."""

    out: Path = Path(".")
    like: Path | None = None
    preview: bool = False
    json_output: bool = False
    compile: bool = False

    def speed(self) -> Speed:
        """The switches of the run."""
        from triptych.pipelines.speed import Speed

        return Speed(compiled=self.compile)


def picture_options(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that puts the options above, but for those named, in the place of `**options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = {
            **get_type_hints(_options, include_extras=True),
            **get_type_hints(command, include_extras=True),
        }
        shared = [p for p in inspect.signature(_options).parameters.values() if p.name not in without]
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [p.replace(annotation=hints[p.name]) for p in (*named, *shared)]
        command.__annotations__ = {p.name: hints[p.name] for p in parameters} | {"return": None}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def split(options: dict[str, Any]) -> tuple[dict[str, Any], RunOptions]:
    """The settings of the request that were given, and the options of the run."""
    names = RunOptions.__dataclass_fields__
    run = RunOptions(**{name: value for name, value in options.items() if name in names})
    given = {name: value for name, value in options.items() if name not in names}
    return {name: value for name, value in given.items() if value is not None and value is not False}, run
