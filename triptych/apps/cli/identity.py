"""`triptych identity`: a picture with somebody's face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from triptych.apps.cli.controlling import Asked, control_options, parsed_box, steer
from triptych.apps.cli.options import picture_options
from triptych.errors import RequestError

HELP = """Make a picture with the face of another.

Examples:

  triptych identity face.png "as an astronaut" --face-model arcface.onnx --controlnet identity.safetensors

  triptych identity group.png "at the beach" --face-model arcface.onnx --face-detector scrfd.onnx

The face is read by ONNX models that you bring: ArcFace to tell faces apart, and SCRFD to find them. Without a
detector the box, or the whole picture, is the face. No ControlNet for faces is published; train one with
the recipe "controlnet".
"""


@picture_options()
@control_options
def identity(
    photo: Annotated[Path | None, Argument(help="The picture with the face.", show_default=False)] = None,
    prompt: Annotated[str | None, Argument(help="What to draw, taken literally.", show_default=False)] = None,
    face_model: Annotated[Path | None, Option(help="ONNX file that reads a face (ArcFace).")] = None,
    face_detector: Annotated[Path | None, Option(help="ONNX file that finds faces (SCRFD).")] = None,
    box: Annotated[str | None, Option(help="Where the face is: x,y,width,height in pixels.")] = None,
    **options: Any,
) -> None:
    if photo is not None and face_model is None:
        raise RequestError("Identity needs a face recogniser: give an ONNX file with --face-model.")
    settings = {
        "face_model": None if face_model is None else str(face_model),
        "face_detector": None if face_detector is None else str(face_detector),
        "box": parsed_box(box),
    }
    steer(Asked("identity", photo, None, settings), prompt, options)
