"""Pictures that people bring: read, named in the request, and turned into what the networks are told.

A request names its pictures by file and SHA-256, so that a PNG which stores it can be made again as long as
those files are there. A reference becomes an embedding, a start becomes semantic latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from triptych.errors import DataError, RequestError
from triptych.images import cover, decode_picture, flatten, read_bytes, to_pixels
from triptych.pipelines.inputs import NOTHING, Inputs
from triptych.pipelines.latents import Latents
from triptych.pipelines.parts import Parts
from triptych.pipelines.request import Request, Source
from triptych.sizes import fitting_size

REFERENCE, START, LATENTS = "reference", "start", "latents"
ENCODER_STRIDE = 32  # pixels per latent of the semantic encoder

Given = Image.Image | Path | str  # a picture, or the file it is in


@dataclass(frozen=True)
class Brought:
    """A picture, RGB and upright, with what the request says of it."""

    image: Image.Image
    source: Source


def bring(picture: Given, role: str, weight: float = 1.0) -> Brought:
    """Read a picture for a request. Raises DataError when it cannot be read, RequestError for its weight."""
    if isinstance(picture, Image.Image):
        image = flatten(picture)
        return Brought(image, _source(role, None, image.tobytes(), weight))
    content = read_bytes(picture)
    return Brought(decode_picture(content, picture), _source(role, str(picture), content, weight))


def bring_again(request: Request) -> list[Brought]:
    """Read the pictures that a request names. Raises RequestError when one has changed since, DataError when
    one is missing."""
    pictures = [source for source in request.sources if source.role != LATENTS]
    return [Brought(decode_picture(_read_again(source), source.file), source) for source in pictures]


def _read_again(source: Source) -> bytes:
    if source.file is None:
        raise RequestError(f"The {source.role} of this request was in no file; pass it again.")
    try:
        content = read_bytes(source.file)
    except DataError as error:
        raise DataError(f"{error} It is the {source.role} of this request, named as it was then.") from None
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise RequestError(
            f"{source.file} is not the file that was used: its SHA-256 is {found[:12]}..., and "
            f"{source.sha256[:12]}... was stored. Put the original back, or name another."
        )
    return content


def bring_latents(path: Path | str) -> tuple[Latents, Source]:
    """Read a file of latents for a request. Raises CheckpointError for any other file."""
    latents = Latents.load(path)
    return latents, _source(LATENTS, str(path), read_bytes(path), 1.0)


def with_latents(inputs: Inputs, request: Request, pixels_per_latent: float) -> Inputs:
    """`inputs` with the latents that a request names, for a model with so many pixels a latent.

    Raises RequestError when they have changed since, or are of another kind of model.
    """
    for source in request.sources:
        if source.role == LATENTS:
            _read_again(source)
            inputs = latents_as_inputs(Latents.load(source.file or ""), pixels_per_latent, inputs)
    return inputs


def latents_as_inputs(latents: Latents, pixels_per_latent: float, inputs: Inputs = NOTHING) -> Inputs:
    """Inputs that are decoded as they are. Raises RequestError for latents of another kind of model."""
    if latents.pixels_per_latent != pixels_per_latent:
        raise RequestError(
            f'These latents were made by the model "{latents.model}", with {latents.pixels_per_latent:g} '
            f"pixels a latent; this model has {pixels_per_latent:g}. Decode with the model that made them."
        )
    return replace(inputs, latents_c=latents.latents_c, latents_b=latents.latents_b)


def sized(request: Request, brought: Sequence[Brought], settings: dict[str, Any], min_side: int) -> Request:
    """The request with a size like that of the picture it starts from, unless it has one.

    `settings` are Stage C's, `min_side` is the shortest side that can be made.
    """
    starts = [one.image.size for one in brought if one.source.role == START]
    if request.size is not None or not starts:
        return request
    width, height = settings["default_size"]
    size = fitting_size(starts[0], (width, height), int(settings.get("size_multiple", 8)), min_side)
    return request.replaced(size=size)


def with_pictures(inputs: Inputs, parts: Parts, request: Request, brought: Sequence[Brought]) -> Inputs:
    """`inputs` with the embeddings of references and the latents of the start among `brought`.

    A weight scales its picture's embedding: zeros are what Stage C was shown for "no picture" in training.
    Several pictures are told one after the other, as further tokens.
    """
    told = [one for one in brought if one.source.role == REFERENCE and one.source.weight > 0]
    if told:
        weights = torch.tensor([one.source.weight for one in told])
        embeds = embed_pictures(parts, [one.image for one in told]).cpu() * weights[:, None]
        inputs = replace(inputs, image_embed=embeds[None], text_pooled=_pooled(parts, embeds))
    for one in brought:
        if one.source.role == START:
            assert request.size is not None
            start = encode_semantic(parts, to_pixels([cover(one.image, request.size)]))
            inputs = replace(inputs, start=start.cpu())
            parts.release("semantic")
    return inputs


def embed_pictures(parts: Parts, images: Sequence[Image.Image]) -> Tensor:
    """Embeddings (N,Wi) of pictures of any size by the model's image tower."""
    with parts.turn("image_encoder") as tower, parts.timed("pictures"):
        embeds = torch.cat([tower.encode(to_pixels([image])) for image in images])
    parts.release("image_encoder")
    return embeds


def pooled_from(parts: Parts, embeds: Tensor) -> Tensor | None:
    """Unit vectors (N,W) of embeddings that can stand in for pooled text, None where they cannot.

    The file of a Stage C whose image tower lands in the text tower's pooled space says so by its setting
    `pooled_from_image`: without a prompt its pooled input then points where the pictures do.
    """
    if not parts.info("stage_c").settings.get("pooled_from_image", False):
        return None
    return F.normalize(embeds, dim=-1)


def _pooled(parts: Parts, embeds: Tensor) -> Tensor | None:
    pooled = pooled_from(parts, embeds.sum(0, keepdim=True))
    return None if pooled is None else pooled[None]


def encode_semantic(parts: Parts, pixels: Tensor) -> Tensor:
    """Pixels (B,3,H,W) -> the `latents_c` that a picture of this size has, by the semantic encoder.

    A model with more than 32 pixels a latent saw its pictures scaled down in training, and so they are here.
    """
    rows, columns = parts.size_c(pixels.shape[2], pixels.shape[3])
    size = (rows * ENCODER_STRIDE, columns * ENCODER_STRIDE)
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    with parts.turn("semantic") as encoder, parts.timed("pictures"), torch.no_grad():
        latents: Tensor = encoder(pixels.to(parts.device)).float()
    return latents


def _source(role: str, file: str | None, content: bytes, weight: float) -> Source:
    try:
        return Source(role=role, file=file, sha256=hashlib.sha256(content).hexdigest(), weight=weight)
    except ValueError:
        raise RequestError(f"The weight of a picture is a number from 0 to 100, not {weight}.") from None
