"""Hints: what ControlNets are told, made from pictures.

`KINDS` lists every kind with its channels, the encoder its ControlNet has, and how it is made from training
pictures; a new kind of control costs one function here, one entry there and one recipe file. Hints are
float32 in [0,1] unless said otherwise (latents, face vectors). Edges need OpenCV (the extra `control`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.conditioning.faces import FaceReader, identity_map
from triptych.conditioning.masks import Saliency, contrast_saliency, random_masks
from triptych.errors import MissingExtra, RequestError

EDGE_SIDE = 224  # pixels; edges are looked for in a picture brought to this square
CANNY_LOW, CANNY_HIGH = 100.0, 200.0
STROKE = 0.35  # a line of a sketch is at least so much darker than the paper
PALETTE_CELLS = 8  # a side
DISCS, DILATIONS = (3, 5, 7), (0, 3, 5, 7, 9)  # sizes drawn from in training, in pixels
FACE_DROPPED, FACE_SPREAD = 0.05, 0.3  # probabilities in training

Array = np.ndarray[Any, np.dtype[Any]]
Draw = Callable[[], Tensor]  # (B,) uniform numbers in [0,1), other ones at every call


@dataclass
class Tools:
    """Networks that some hints need, and choices for training."""

    semantic: nn.Module | None = None  # for super-resolution
    saliency: Saliency = contrast_saliency
    edges: nn.Module | None = None  # PiDiNet, for soft edges
    faces: FaceReader | None = None  # for identity
    box_share: float = 0.0  # of inpainting masks that are boxes
    shrink: str = "nearest"  # how pictures are made small for super-resolution: nearest (as published), area


def cv2() -> Any:
    """OpenCV. Raises MissingExtra when it is not installed."""
    try:
        import cv2 as opencv
    except ImportError:
        raise MissingExtra("opencv-python-headless", "control", "Finding edges") from None
    return opencv


# Edges.


def canny_hint(
    pixels: Tensor, low: float = CANNY_LOW, high: float = CANNY_HIGH, side: int | None = EDGE_SIDE
) -> Tensor:
    """Canny edges of pixels (B,3,H,W), white on black, (B,1,H,W). `side` None looks at full size.

    Raises RequestError unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise RequestError(f"Canny's thresholds are 0 <= low <= high; {low:g} and {high:g} were given.")
    found = [torch.from_numpy(cv2().Canny(picture, low, high)) for picture in _bytes(pixels, side)]
    return _back(torch.stack(found)[:, None].float() / 255, pixels)


def sketch_hint(pixels: Tensor, side: int = EDGE_SIDE) -> Tensor:
    """The lines of a sketch (B,3,H,W), dark on light or light on dark, as edges one pixel wide, (B,1,H,W).

    Transparent sketches are read as dark lines on white (`images.flatten`). Raises RequestError when there is
    no line.
    """
    small = F.interpolate(pixels.mean(1, keepdim=True), (side, side), mode="area")
    paper = small.flatten(1).median(dim=1).values[:, None, None, None]
    contrast = (small - paper).abs()
    if bool((contrast.amax((1, 2, 3)) < STROKE / 2).any()):
        raise RequestError(
            "The sketch shows no lines: draw dark on white, or leave --sketch out for a photo."
        )
    strokes = contrast > STROKE * contrast.amax((1, 2, 3), keepdim=True)
    thin = [torch.from_numpy(thinned(lines.numpy())) for lines in strokes[:, 0].cpu()]
    return _back(torch.stack(thin)[:, None].to(pixels), pixels)


def thinned(lines: Array) -> Array:
    """Lines (H,W) of booleans worn down to one pixel [Zhang 1984]: ends and connections stay."""
    kept = np.pad(np.asarray(lines, dtype=bool), 1)
    changed = True
    while changed:
        changed = False
        for turn in (0, 1):
            # The eight neighbours clockwise from above: P2 to P9 of the paper.
            shifts = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            around = np.stack([np.roll(kept, (-dy, -dx), (0, 1)) for dy, dx in shifts])
            count = around.sum(0)
            rises = (~around & np.roll(around, -1, axis=0)).sum(0)
            up, right, down, left = around[0], around[2], around[4], around[6]
            first = ~(up & right & down) & ~(right & down & left)
            second = ~(up & right & left) & ~(up & down & left)
            worn = kept & (count >= 2) & (count <= 6) & (rises == 1) & (second if turn else first)
            kept = kept & ~worn
            changed |= bool(worn.any())
    return kept[1:-1, 1:-1]


def soft_edges_hint(
    pixels: Tensor, edges: nn.Module, threshold: float = 0.3, dilation: int = 0, side: int = EDGE_SIDE
) -> Tensor:
    """Edges by PiDiNet (`edges`), thickened by a square of `dilation` pixels and made black and white."""
    found = edges(F.interpolate(pixels, (side, side), mode="bilinear"))
    if dilation:
        found = F.max_pool2d(found, dilation, stride=1, padding=dilation // 2)
    return _back((found > threshold).float(), pixels)


def qr_hint(pixels: Tensor, disc: int = 5, side: int = EDGE_SIDE) -> Tensor:
    """Light parts 1, dark parts 0, the rest 0.5, after blurring and closing with a disc of `disc` pixels."""
    opencv = cv2()
    kernel = opencv.getStructuringElement(opencv.MORPH_ELLIPSE, (disc, disc))
    hints = []
    for picture in _bytes(pixels, side):
        value = opencv.GaussianBlur(picture.max(axis=2), (15, 15), 0)  # V of HSV is the largest channel
        value = opencv.morphologyEx(value, opencv.MORPH_CLOSE, kernel).astype(np.float32)
        low, high = float(value.min()), float(value.max())
        third = 0.33 * (high - low)
        levels = np.full_like(value, 0.5)
        levels[value < low + third] = 0
        levels[value > high - third] = 1
        hints.append(torch.from_numpy(levels))
    return _back(torch.stack(hints)[:, None], pixels)


def _bytes(pixels: Tensor, side: int | None) -> list[Array]:
    """Pictures (H,W,3) of bytes, brought to a square whatever their shape; fractions are cut off."""
    if side is not None:
        pixels = F.interpolate(pixels, (side, side), mode="bilinear")
    arrays = (pixels.float().clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [np.ascontiguousarray(array) for array in arrays.numpy()]


def _back(hint: Tensor, pixels: Tensor) -> Tensor:
    if hint.shape[-2:] != pixels.shape[-2:]:
        hint = F.interpolate(hint.float(), pixels.shape[-2:], mode="bilinear")
    return hint.to(pixels.device)


# What is left out, what is small, which colours.


def inpainting_hint(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B,3,H,W) with the masked part white, and the mask as fourth channel."""
    mask = mask.expand(len(pixels), -1, -1, -1).to(pixels)
    return torch.cat([torch.where(mask > 0, torch.ones_like(pixels), pixels), mask], dim=1)


def super_resolution_hint(latents: Tensor, factor: float = 2) -> Tensor:
    """Semantic latents (B,16,h,w) of a small picture, each repeated for the map of the large one."""
    return F.interpolate(latents, scale_factor=factor, mode="nearest")


def shrunk(pixels: Tensor, factor: int, how: str = "nearest") -> Tensor:
    """Pixels (B,3,H,W) at 1/factor of their size, by picking pixels ("nearest") or averaging ("area")."""
    size = [side // factor for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size, mode=how)


def pixel_super_resolution_hint(small: Tensor, size: Sequence[int]) -> Tensor:
    """A small picture (B,3,h,w) at the size (height, width) of the large one, pixels as squares."""
    return F.interpolate(small, tuple(size), mode="nearest")


def palette_hint(pixels: Tensor, cells: int = PALETTE_CELLS) -> Tensor:
    """Mean colours of `cells` x `cells` parts of pixels (B,3,H,W): where which colour is, and no lines."""
    return F.interpolate(F.adaptive_avg_pool2d(pixels, cells), pixels.shape[-2:], mode="nearest")


# How each kind is made of training pictures.


def _train_canny(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    return canny_hint(pixels)


def _train_inpainting(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    return inpainting_hint(pixels, random_masks(pixels, draw, tools.box_share, tools.saliency))


def _train_super_resolution(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    assert tools.semantic is not None
    return super_resolution_hint(tools.semantic(shrunk(pixels, 2, tools.shrink)))


def _train_pixel_super_resolution(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    return pixel_super_resolution_hint(shrunk(pixels, 4, tools.shrink), pixels.shape[-2:])


def _train_palette(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    return palette_hint(pixels)


def _train_identity(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    assert tools.faces is not None
    drops, spreads = [draw() for _ in range(4)], draw()
    maps = []
    for row, picture in enumerate(pixels):
        faces = tools.faces.find(picture)
        kept = [face for face, drop in zip(faces, drops, strict=False) if drop[row] >= FACE_DROPPED]
        spread = len(kept) == 1 and bool(spreads[row] < FACE_SPREAD)
        maps.append(identity_map(pixels.shape[-2:], kept, spread))
    return torch.stack(maps).to(pixels)


def _train_qr(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    sizes = draw()
    hints = [qr_hint(one[None], DISCS[int(u * len(DISCS))]) for one, u in zip(pixels, sizes, strict=True)]
    return torch.cat(hints)


def _train_soft_edges(pixels: Tensor, draw: Draw, tools: Tools) -> Tensor:
    assert tools.edges is not None
    sizes, levels = draw(), draw()
    hints = [
        soft_edges_hint(one[None], tools.edges, 0.05 + 0.65 * float(v), DILATIONS[int(u * len(DILATIONS))])
        for one, u, v in zip(pixels, sizes, levels, strict=True)
    ]
    return torch.cat(hints)


@dataclass(frozen=True)
class Kind:
    """`make(pixels, draw, tools)` is the hint of training pictures; `needs` names fields of `Tools`."""

    channels: int
    bottleneck: str
    make: Callable[[Tensor, Draw, Tools], Tensor]
    needs: tuple[str, ...] = ()


KINDS = {
    "canny": Kind(1, "effnet", _train_canny),
    "inpainting": Kind(4, "effnet", _train_inpainting),
    "super_resolution": Kind(16, "large", _train_super_resolution, ("semantic",)),
    "pixel_super_resolution": Kind(3, "effnet", _train_pixel_super_resolution),
    "identity": Kind(512, "simple", _train_identity, ("faces",)),
    "qr": Kind(1, "effnet", _train_qr),
    "soft_edges": Kind(1, "effnet", _train_soft_edges, ("edges",)),
    "palette": Kind(3, "effnet", _train_palette),
}
