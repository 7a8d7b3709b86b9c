"""Controls: a request's pictures -> hints -> residuals in Stage C, and exact pixels outside a mask.

A `ControlRequest` says in plain values which ControlNet acts, on which of the request's pictures, how
strongly and when; everything here follows from it, so a PNG that stores its request can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.catalog import beside, find_controlnet
from triptych.checkpoints.fit import check_addon
from triptych.checkpoints.load import describe_part, load_part
from triptych.conditioning import hints
from triptych.conditioning.faces import FaceReader, identity_map
from triptych.conditioning.masks import (
    Saliency,
    box_mask,
    checked,
    contrast_saliency,
    mask_from_image,
    saliency_mask,
    soft_edge,
)
from triptych.errors import CheckpointError, RequestError, nearest
from triptych.images import to_images, to_pixels
from triptych.models.controlnet import ControlNet
from triptych.models.stage_c import StageCConfig
from triptych.pipelines.inputs import Control, Inputs, Known
from triptych.pipelines.parts import Parts
from triptych.pipelines.pictures import ENCODER_STRIDE, Brought, Given, bring, encode_semantic
from triptych.pipelines.request import ControlRequest, Picture, Request
from triptych.sizes import fitting_size

CONTROL, MASK = "control", "mask"  # roles of pictures in a request
FACTORS = {"super_resolution": 2, "pixel_super_resolution": 4}
EDGE_SHARE = 32  # the soft edge inside a mask is the shorter side over this, in pixels


def check_controls(parts: Parts, request: Request) -> None:
    """Raise RequestError or CheckpointError unless every control can act on this model's Stage C.

    Only headers are read; published ControlNets are downloaded here the first time.
    """
    for control in request.controls:
        if control.hint not in hints.KINDS:
            raise RequestError(f'There is no control "{control.hint}": {nearest(control.hint, hints.KINDS)}.')
        if control.hint == "identity" and control.face_model is None:
            raise RequestError("Identity needs a face recogniser: give an ONNX file with --face-model.")
        controlnet_file(parts, control.hint, control.controlnet)
    if request.upscale is not None:
        controlnet_file(parts, "super_resolution", None)


def controlnet_file(parts: Parts, hint: str, given: str | None) -> Path:
    """The file of a ControlNet, which fits this model's Stage C and was trained on this kind of hint.

    Raises CheckpointError otherwise.
    """
    path = find_controlnet(parts.files, hint) if given is None else Path(given)
    if not path.is_file():
        raise CheckpointError(f"There is no ControlNet at {path}; give a safetensors file.")
    stage_c = parts.info("stage_c")
    config = StageCConfig(**stage_c.config)
    check_addon(path, config.widths[0], stage_c.size)
    info = describe_part(path, "controlnet")
    channels = hints.KINDS[hint].channels
    if info.config["channels"] != channels:
        raise CheckpointError(
            f"{path} takes hints of {info.config['channels']} channels ({info.settings.get('hint')}); "
            f'a hint of the kind "{hint}" has {channels}.'
        )
    if info.config["blocks"][-1] >= config.conv_blocks:
        raise CheckpointError(
            f"{path} adds to block {info.config['blocks'][-1]} of a Stage C; this one has "
            f"{config.conv_blocks} blocks, so it was made for another."
        )
    return path


def sized_for_controls(
    request: Request, brought: Sequence[Brought], default: tuple[int, int], multiple: int, smallest: int
) -> Request:
    """The request with a size that suits the picture of its first control, unless it has one.

    Super-resolution multiplies the picture's own sides; everything else gets its shape at about the area
    `default`. A hole in a picture of any size is drawn at that size and scaled to fit.
    """
    if request.size is not None or not request.controls or not brought:
        return request
    control = request.controls[0]
    width, height = picture_of(request, brought, control.picture).size
    factor = FACTORS.get(control.hint)
    if factor is not None:
        least = -(-smallest // multiple) * multiple
        wide, high = (max(least, round(side * factor / multiple) * multiple) for side in (width, height))
        return request.replaced(size=(wide, high))
    left, top, right, bottom = control.extend or (0, 0, 0, 0)
    return request.replaced(
        size=fitting_size((width + left + right, height + top + bottom), default, multiple, smallest)
    )


def picture_of(request: Request, brought: Sequence[Brought], place: int) -> Image.Image:
    """The picture that stands at `place` among the sources of a request."""
    if not 0 <= place < len(request.sources):
        raise RequestError(f"A control names picture {place}; the request has {len(request.sources)}.")
    return next(one.image for one in brought if one.source == request.sources[place])


def with_controls(inputs: Inputs, parts: Parts, request: Request, brought: Sequence[Brought]) -> Inputs:
    """`inputs` with the residuals of every control, and the finish that keeps pixels outside a mask."""
    for control in request.controls:
        with parts.timed("controls"):
            hint = make_hint(parts, request, control, brought)
            acting = run_controlnet(parts, control, hint)
        inputs = replace(inputs, controls=(*inputs.controls, acting))
        if control.hint == "inpainting":
            canvas, mask = canvas_and_mask(parts, request, control, brought)
            inputs = replace(inputs, finish=keeping_outside(canvas, mask))
            if parts.info("stage_c").settings.get("hold", False) if control.hold is None else control.hold:
                inputs = replace(inputs, known=known_outside(parts, request, canvas, mask))
    return inputs


def run_controlnet(parts: Parts, control: ControlRequest, hint: Tensor) -> Control:
    """What the ControlNet of `control` adds for a hint (N,c,H,W). It runs once, in float32."""
    path = controlnet_file(parts, control.hint, control.controlnet)
    network, _ = load_part(path, "controlnet", dtype=torch.float32)
    assert isinstance(network, ControlNet)
    with torch.no_grad():
        residuals = network.to(parts.device)(hint.to(parts.device, torch.float32))
    scaled = [None if residual is None else residual * control.weight for residual in residuals]
    return Control(scaled, control.begin, control.end)


def upscaling(parts: Parts, latents_c: Tensor) -> Control:
    """What steers Stage C towards `latents_c` (N,16,h,w) at twice their size; no pixels in between."""
    control = ControlRequest(hint="super_resolution", picture=0)
    return run_controlnet(parts, control, hints.super_resolution_hint(latents_c.float()))


# Hints.


def make_hint(parts: Parts, request: Request, control: ControlRequest, brought: Sequence[Brought]) -> Tensor:
    """The hint of one control, (1,c,H,W), for the request's size.

    Raises RequestError for pictures that give none: no face, no lines, nothing masked.
    """
    high, wide = (side * ENCODER_STRIDE for side in parts.size_c(*request.base_sides()))
    if control.hint == "inpainting":
        canvas, mask = canvas_and_mask(parts, request, control, brought)
        pixels = to_pixels([canvas.resize((wide, high), Image.Resampling.BILINEAR)])
        return hints.inpainting_hint(pixels, F.interpolate(mask, (high, wide), mode="nearest"))
    image = picture_of(request, brought, control.picture)
    if control.hint in FACTORS:
        small = to_pixels([image])
        if control.hint == "pixel_super_resolution":
            return hints.pixel_super_resolution_hint(small, (high, wide))
        small = F.interpolate(small, (high // 2, wide // 2), mode="bilinear", antialias=True)
        with parts.turn("semantic") as encoder, torch.no_grad():
            latents = encoder(_even(small).to(parts.device)).float().cpu()
        rows, columns = parts.size_c(*request.base_sides())
        return F.interpolate(latents, (rows, columns), mode="nearest")
    pixels = to_pixels([image.resize((wide, high), Image.Resampling.BICUBIC)])
    if control.hint == "canny":
        if control.sketch:
            return hints.sketch_hint(to_pixels([image.resize((wide, high), Image.Resampling.BOX)]))
        return hints.canny_hint(pixels, control.low, control.high)
    if control.hint == "identity":
        return _identity(image, control, (high, wide))
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "qr": hints.qr_hint,
        "palette": hints.palette_hint,
        "soft_edges": _soft_edges(parts),
    }
    return makers[control.hint](pixels)


def _even(pixels: Tensor) -> Tensor:
    """Pixels with sides of multiples of the encoder's stride."""
    size = [max(ENCODER_STRIDE, round(side / ENCODER_STRIDE) * ENCODER_STRIDE) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def _identity(image: Image.Image, control: ControlRequest, size: tuple[int, int]) -> Tensor:
    """Faces where they are in the picture, or all over the hint when the picture shows one face only."""
    assert control.face_model is not None
    reader = FaceReader(control.face_model, control.face_detector)
    faces = reader.main(to_pixels([image])[0], control.box)
    down, across = size[0] / image.height, size[1] / image.width
    placed = []
    for face in faces:
        left, top, right, bottom = face.box
        placed.append(replace(face, box=(left * across, top * down, right * across, bottom * down)))
    return identity_map(size, placed, spread=len(placed) == 1)[None]


def _soft_edges(parts: Parts) -> Callable[[Tensor], Tensor]:
    def make(pixels: Tensor) -> Tensor:
        path = beside(parts.files, "pidinet")
        if path is None:
            raise CheckpointError(
                "Soft edges need the edge network PiDiNet as a safetensors file beside the model's parts."
            )
        with torch.no_grad():
            return hints.soft_edges_hint(pixels, load_part(path, "pidinet", dtype=torch.float32)[0])

    return make


# Inpainting.


def canvas_and_mask(
    parts: Parts, request: Request, control: ControlRequest, brought: Sequence[Brought]
) -> tuple[Image.Image, Tensor]:
    """The picture, made larger at the sides asked for, and its mask (1,1,H,W), both at the result's size."""
    image = picture_of(request, brought, control.picture)
    left, top, right, bottom = control.extend or (0, 0, 0, 0)
    size = (image.width + left + right, image.height + top + bottom)
    mask = _inner_mask(parts, control, image, request, brought)
    if control.extend:
        mask = F.pad(mask, (left, right, top, bottom), value=1.0)
        canvas = Image.new("RGB", size, "white")
        canvas.paste(image, (left, top))
        image = canvas
    return image, checked(mask, "Nothing is to be drawn")


def _inner_mask(
    parts: Parts,
    control: ControlRequest,
    image: Image.Image,
    request: Request,
    brought: Sequence[Brought],
) -> Tensor:
    """What is to be drawn anew inside the picture itself."""
    if control.mask is not None:
        return mask_from_image(picture_of(request, brought, control.mask), image.size)
    if control.box is not None:
        return box_mask(control.box, image.size)
    if control.salient is not None:
        found = saliency_mask(to_pixels([image]), control.salient, saliency=_saliency(parts))
        return checked(found, "Nothing in the picture stands out")
    return torch.zeros(1, 1, image.height, image.width)


def _saliency(parts: Parts) -> Saliency:
    """The model's saliency network where it has one, else contrast with the picture's rim."""
    path = beside(parts.files, "saliency")
    if path is None:
        return contrast_saliency
    network, _ = load_part(path, "saliency", dtype=torch.float32)

    @torch.no_grad()
    def look(pixels: Tensor) -> Tensor:
        found: Tensor = network(pixels)
        return found

    return look


def keeping_outside(canvas: Image.Image, mask: Tensor) -> Callable[[Image.Image, Picture], Image.Image]:
    """A finish that lays a drawn picture into the hole of `canvas`: pixels outside stay exactly as they are.

    The two blend over a soft edge inside the mask. The result has the size of the canvas.
    """
    weights = soft_edge(mask, max(2, min(canvas.size) // EDGE_SHARE))[0, 0, :, :, None].numpy()
    original = np.asarray(canvas, dtype=np.float32)

    def finish(drawn: Image.Image, picture: Picture) -> Image.Image:
        if drawn.size != canvas.size:
            drawn = drawn.resize(canvas.size, Image.Resampling.LANCZOS)
        blended = original + weights * (np.asarray(drawn, dtype=np.float32) - original)
        return Image.fromarray(blended.round().clip(0, 255).astype(np.uint8))

    return finish


def known_outside(parts: Parts, request: Request, canvas: Image.Image, mask: Tensor) -> Known:
    """The semantic latents of `canvas` that no part of `mask` (1,1,H,W) touches.

    The encoder sees the mean colour in the hole: it looks far, and would tell what was there.
    """
    height, width = request.base_sides()
    pixels = to_pixels([canvas.resize((width, height), Image.Resampling.BICUBIC)])
    hole = F.interpolate(mask, (height, width), mode="nearest")
    outside = 1 - hole
    mean = (pixels * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True).clamp(min=1)
    latents = encode_semantic(parts, torch.lerp(pixels, mean, hole))
    return Known(latents.cpu(), F.adaptive_max_pool2d(hole, latents.shape[-2:]))


# What a person sees of a hint.


def hint_image(parts: Parts, kind: str, hint: Tensor) -> Image.Image:
    """A hint (1,c,H,W) as a picture: latents through the previewer, face vectors as where they are."""
    if kind == "super_resolution" and parts.files.previewer is not None:
        with parts.turn("previewer") as network, torch.no_grad():
            (image,) = to_images(network(hint.to(parts.device)))
        return image
    if kind == "inpainting":
        tint = torch.tensor([0.85, 0.25, 0.25])[:, None, None]
        shown = torch.where(hint[:, 3:] > 0, tint, hint[:, :3])
    elif hint.shape[1] in (1, 3):
        shown = hint.expand(-1, 3, -1, -1)
    else:
        strength = hint.float().norm(dim=1, keepdim=True)
        shown = (strength / strength.amax().clamp_min(1e-6)).expand(-1, 3, -1, -1)
        shown = F.interpolate(shown, scale_factor=ENCODER_STRIDE, mode="nearest")
    (image,) = to_images(shown)
    return image


def hint_images(parts: Parts, request: Request, brought: Sequence[Brought]) -> list[Image.Image]:
    """What the ControlNets of a resolved request are told, one picture for each control."""
    return [
        hint_image(parts, control.hint, make_hint(parts, request, control, brought))
        for control in request.controls
    ]


# Requests.


@dataclass(frozen=True)
class Steering:
    """One control to ask for: its kind, its picture, perhaps a mask, further fields of `ControlRequest`."""

    hint: str
    picture: Given
    mask: Given | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def steered(
    prompt: str, controls: Sequence[Steering], settings: Mapping[str, Any]
) -> tuple[Request, list[Brought]]:
    """A request for pictures that follow `controls`, and what it brought.

    `settings` are the other fields of `Request`. Raises RequestError, and DataError for unreadable pictures.
    """
    brought: list[Brought] = []
    asked = []
    for one in controls:
        places: dict[str, int] = {"picture": len(brought)}
        brought.append(bring(one.picture, CONTROL))
        if one.mask is not None:
            places["mask"] = len(brought)
            brought.append(bring(one.mask, MASK))
        asked.append(ControlRequest(hint=one.hint, **places, **one.settings))
    sources = tuple(one.source for one in brought)
    return Request(prompt=prompt, sources=sources, controls=tuple(asked), **settings), brought
