"""What the commands with a ControlNet share: their options, and the request made of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from triptych.apps.cli.making import make, prepare_folder, requested, stem
from triptych.apps.cli.options import split
from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.apps.cli.making import Prepare
    from triptych.pipelines.cascade import Cascade
    from triptych.pipelines.control import Steering
    from triptych.pipelines.inputs import Inputs
    from triptych.pipelines.request import ControlRequest, Request

CONTROL_HELP = (
    "A further control, KIND=PICTURE or FILE=PICTURE, then perhaps ,weight=0.5,start=0,end=0.6; repeatable."
)
Hold = Annotated[
    bool | None,
    Option(
        "--hold/--no-hold",
        help="Latents outside stay the picture's while the rest is drawn. [as the model's file says]",
    ),
]
FIELDS = {
    "control_weight": "weight",
    "control_start": "begin",
    "control_end": "end",
    "controlnet": "controlnet",
}


def _options(
    controlnet: Annotated[str | None, Option(help="Another ControlNet: a file.")] = None,
    control_weight: Annotated[float | None, Option(help="How strongly the control acts, from 0. [1]")] = None,
    control_start: Annotated[
        float | None, Option(help="Fraction of the sampling at which the control begins to act. [0]")
    ] = None,
    control_end: Annotated[
        float | None, Option(help="Fraction of the sampling at which it stops. [1]")
    ] = None,
    control: Annotated[list[str] | None, Option(help=CONTROL_HELP)] = None,
    save_hint: Annotated[
        bool, Option("--save-hint", help="Also write what the ControlNet is told, NAME.hint.png.")
    ] = False,
) -> None:
    """Only the signature is used."""


def control_options(command: Callable[..., None]) -> Callable[..., None]:
    """A decorator that puts the options above before those of `picture_options`, which goes on top of it."""
    hints = {
        **get_type_hints(_options, include_extras=True),
        **get_type_hints(command, include_extras=True),
    }
    own = list(inspect.signature(command).parameters.values())
    shared = inspect.signature(_options).parameters.values()
    merged = [p.replace(annotation=hints[p.name]) for p in (*own[:-1], *shared)]
    command.__annotations__ = {**{p.name: hints[p.name] for p in merged}, "options": Any, "return": None}
    command.__signature__ = inspect.Signature([*merged, own[-1]])  # type: ignore[attr-defined]
    return command


@dataclass(frozen=True)
class Asked:
    """What was typed for one control: its kind, its picture and mask, and settings of its own."""

    hint: str
    photo: Path | None
    mask: Path | None
    settings: dict[str, Any]


def steer(asked: Asked, prompt: str | None, options: dict[str, Any]) -> None:
    """Make the pictures of a command with a ControlNet."""
    given, run = split(options)
    given, more, save_hint = without_controls(given)
    settings = {FIELDS[name]: given.pop(name) for name in FIELDS if name in given}
    settings |= {name: value for name, value in asked.settings.items() if value is not None}
    if asked.photo is None:
        if run.like is None:
            command = {"inpainting": "inpaint", "super_resolution": "upscale"}.get(asked.hint, asked.hint)
            raise RequestError(f"A picture is needed, for example: triptych {command} photo.png.")
        given |= {} if prompt is None else {"prompt": prompt}
        if settings or more:
            given["controls"] = changed(requested({}, run.like)[0].controls, settings, more)
        request, wanted = requested(given, run.like)
    else:
        from triptych.pipelines.control import Steering, steered

        first = Steering(asked.hint, asked.photo, asked.mask, settings)
        if run.like is not None:  # the settings of a picture, with another picture
            stored, _ = requested({**given, "prompt": prompt or ""}, run.like)
            given = {
                name: getattr(stored, name) for name in stored.model_fields_set - {"sources", "controls"}
            }
            prompt = given.pop("prompt")
        request, wanted = steered(prompt or "", [first, *more], given)[0], None
    make(request, wanted, run, saving_hints(run.out) if save_hint else None)


def without_controls(given: dict[str, Any]) -> tuple[dict[str, Any], list[Steering], bool]:
    """The options without --control and --save-hint, and what those said."""
    rest = dict(given)
    more = [further(text) for text in rest.pop("control", None) or []]
    return rest, more, bool(rest.pop("save_hint", False))


def changed(
    stored: tuple[ControlRequest, ...], settings: dict[str, Any], more: list[Steering]
) -> tuple[ControlRequest, ...]:
    """The controls of a picture that is repeated, the first with other settings."""
    from triptych.pipelines.request import ControlRequest

    if more:
        raise RequestError(
            "--like keeps the controls of the picture; name the photo again to add further ones."
        )
    if not stored:
        raise RequestError("The picture to repeat was made without a control; give a photo.")
    return (ControlRequest(**{**stored[0].model_dump(), **settings}), *stored[1:])


def further(text: str) -> Steering:
    """What "KIND=PICTURE,weight=0.5,start=0,end=0.6" names; a ControlNet's file may be the kind."""
    from triptych.checkpoints.load import describe_part
    from triptych.pipelines.control import Steering

    kind, equals, rest = text.partition("=")
    picture, *pairs = rest.split(",")
    if not equals or not kind or not picture:
        raise RequestError(f'--control "{text}" is not of the form KIND=PICTURE, such as canny=drawing.png.')
    settings: dict[str, Any] = {}
    if Path(kind).is_file():
        settings["controlnet"] = kind
        kind = str(describe_part(kind, "controlnet").settings.get("hint"))
    names = {"weight": "weight", "start": "begin", "end": "end"}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            settings[names[name.strip()]] = float(value)
        except (KeyError, ValueError):
            raise RequestError(
                f'--control "{text}": "{pair}" is none of weight=, start= and end= with a number.'
            ) from None
    return Steering(kind, picture, settings=settings)


def saving_hints(out: Path) -> Prepare:
    """A `prepare` for `make` that writes the hints first."""

    def prepare(cascade: Cascade, request: Request) -> Inputs:
        from triptych.images import save_png
        from triptych.pipelines.inputs import NOTHING

        prepare_folder(out, request)
        first = request.pictures()[0]
        for image in cascade.hints(request):
            path = save_png(out, f"{stem(first.prompt, first.seed, request)}.hint", image)
            print(f"Hint: {path}", file=sys.stderr)
        return NOTHING

    return prepare


def parsed_box(text: str | None) -> tuple[int, int, int, int] | None:
    """x,y,width,height as numbers."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(number) for number in text.split(","))
    except ValueError:
        raise RequestError(
            f'--box "{text}" is not x,y,width,height in pixels, such as 40,60,100,80.'
        ) from None
    return x, y, width, height
