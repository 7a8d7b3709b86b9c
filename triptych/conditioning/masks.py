"""Masks for inpainting: from a file, a box, the sides of a picture, what stands out in it, or at random.

A mask is (B,1,H,W) float32, 1 where something new is to be drawn and 0 where the picture stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from triptych.errors import RequestError
from triptych.images import to_pixels

BLUR, BLUR_SIDE = 141, 768  # the kernel that rounds a saliency mask off, and the published training side
THRESHOLDS = (0.04, 0.4)  # saliency above a level drawn from this range is masked in training
INVERTED = 0.4  # share of training masks that are turned over: outpainting
SHOWN_THRESHOLD = 0.2  # of the published examples
TEMPERATURE, KEPT = 0.03, 0.75  # of the smart crop

Saliency = Callable[[Tensor], Tensor]  # pixels (B,3,H,W) -> (B,1,h,w) in [0,1]


def mask_from_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """White parts of a picture as a mask (1,1,H,W) for a picture of `size` (width, height).

    Raises RequestError when its shape is another one, or when it masks nothing.
    """
    width, height = size
    if abs(image.width * height - image.height * width) > 0.02 * width * image.height:
        raise RequestError(
            f"The mask has {image.width}x{image.height} pixels and the picture {width}x{height}: their "
            "shapes differ; the mask must cover the whole picture."
        )
    grey = to_pixels([image.convert("L")]).mean(1, keepdim=True)
    return checked((F.interpolate(grey, (height, width), mode="nearest") > 0.5).float(), "The mask is black")


def box_mask(box: Sequence[int], size: tuple[int, int]) -> Tensor:
    """`box` (x, y, width, height) as a mask (1,1,H,W) for a picture of `size` (width, height).

    Raises RequestError when no pixel of the picture is inside.
    """
    x, y, wide, high = box
    width, height = size
    mask = torch.zeros(1, 1, height, width)
    if wide > 0 and high > 0:
        mask[..., max(0, y) : max(0, y + high), max(0, x) : max(0, x + wide)] = 1
    return checked(mask, f"The box {x},{y},{wide},{high} holds no pixel of a picture of {width}x{height}")


def checked(mask: Tensor, fault: str) -> Tensor:
    """The mask, unless there is nothing in it. Raises RequestError."""
    if not bool(mask.any()):
        raise RequestError(f"{fault}: mark the part to draw anew (white in a mask file).")
    return mask


def contrast_saliency(pixels: Tensor) -> Tensor:
    """Saliency without a network: how far each colour is from that of the rim, 1 at the farthest.

    Made for drawings on a plain ground; photographs are better served by the published network.
    """
    rim = torch.cat([pixels[..., :2, :].flatten(2), pixels[..., -2:, :].flatten(2),
                     pixels[..., :2].flatten(2), pixels[..., -2:].flatten(2)], dim=2)  # fmt: skip
    ground = rim.median(dim=2).values[..., None, None]
    distance = (pixels - ground).norm(dim=1, keepdim=True)
    distance = F.avg_pool2d(distance, 5, stride=1, padding=2)
    return distance / distance.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)


def saliency_mask(
    pixels: Tensor,
    threshold: float | Tensor = SHOWN_THRESHOLD,
    inverted: bool | Tensor = False,
    saliency: Saliency = contrast_saliency,
    blur: int | None = None,
) -> Tensor:
    """What stands out in pixels (B,3,H,W), with a rounded outline, as a mask; `inverted`: all the rest.

    `threshold` and `inverted` may be (B,), one for each picture. `blur` is the odd kernel that rounds, by
    default the published one in proportion to the picture.
    """
    levels, turned = (torch.as_tensor(value).reshape(-1, 1, 1, 1) for value in (threshold, inverted))
    mask = saliency(pixels) > levels.to(pixels)
    mask = mask ^ turned.to(mask)
    full = F.interpolate(mask.float(), pixels.shape[-2:], mode="nearest")
    return (gaussian_blur(full, blur or int(BLUR * min(full.shape[-2:]) / BLUR_SIDE) | 1) > 0.5).float()


def gaussian_blur(x: Tensor, kernel: int) -> Tensor:
    """x (B,1,H,W) blurred by `kernel` taps, borders mirrored; the deviation follows from the kernel as in
    OpenCV. Maps too small to mirror so far get the largest kernel they allow."""
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    for axis in (2, 3):
        half = min(kernel // 2, x.shape[axis] - 1)
        places = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
        weights = torch.exp(-0.5 * (places / sigma) ** 2)
        weights = weights / weights.sum()
        pad = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), weights.reshape(shape))
    return x


def random_masks(
    pixels: Tensor,
    draw: Callable[[], Tensor],
    box_share: float = 0.0,
    saliency: Saliency = contrast_saliency,
) -> Tensor:
    """Masks to train on: saliency above a random level, turned over with probability INVERTED, as published.

    `draw` gives (B,) uniform numbers. `box_share` of the pictures get a random box instead, half as wide and
    high as the picture on average, turned over like the rest.
    """
    low, high = THRESHOLDS
    threshold, turned = low + (high - low) * draw(), draw() < INVERTED
    masks = saliency_mask(pixels, threshold, turned, saliency)
    if box_share:
        height, width = pixels.shape[-2:]
        chosen, *numbers = draw() < box_share, *(draw() for _ in range(4))
        for row in chosen.nonzero().flatten().tolist():
            wide, high_, left, top = (float(number[row]) for number in numbers)
            columns, lines = (
                max(8, int(side * (0.2 + 0.6 * u))) for side, u in ((width, wide), (height, high_))
            )
            x, y = int(left * (width - columns + 1)), int(top * (height - lines + 1))
            box = box_mask((x, y, columns, lines), (width, height))[0].to(masks)
            masks[row] = 1 - box if bool(turned[row]) else box
    return masks


def soft_edge(mask: Tensor, width: int) -> Tensor:
    """Weights (1,1,H,W) in [0,1] that rise over `width` pixels from 0 at the rim of a mask to 1 inside.

    Outside they are exactly 0. Parts of the mask thinner than the edge get as far as they are deep, scaled to
    reach 1; the border of the picture counts as inside.
    """
    inside, total = mask, torch.zeros_like(mask)
    depth = 0
    while depth < width and bool(inside.any()):
        total = total + inside
        inside = 1 - F.max_pool2d(1 - inside, 3, stride=1, padding=1)
        depth += 1
    deepest = F.max_pool2d(total, 2 * width + 1, stride=1, padding=width).clamp_min(1)
    return mask * (total / torch.minimum(deepest, torch.full_like(deepest, float(depth)))).clamp(0, 1)


def salient_place(saliency: Tensor) -> tuple[float, float]:
    """The middle (down, across), in [0, 1], of what stands out most in a saliency map (h,w)."""
    weights = torch.softmax(saliency.flatten() / TEMPERATURE, 0).view_as(saliency)
    rows, columns = (weights > KEPT * weights.max()).nonzero(as_tuple=True)
    height, width = saliency.shape
    return float(rows.float().mean()) / max(1, height - 1), float(columns.float().mean()) / max(1, width - 1)


def smart_crop(pixels: Tensor, size: tuple[int, int], saliency: Tensor) -> Tensor:
    """The part of one picture (3,H,W) of `size` (height, width) around what stands out in it.

    `saliency` is its map (h,w). A picture smaller than the crop is padded with black around its middle.
    """
    height, width = pixels.shape[-2:]
    high, wide = size
    if height < high or width < wide:
        top, left = max(0, high - height), max(0, wide - width)
        padded = F.pad(pixels, (left // 2, left - left // 2, top // 2, top - top // 2))
        top, left = (padded.shape[-2] - high) // 2, (padded.shape[-1] - wide) // 2
        return padded[..., top : top + high, left : left + wide]
    centre = salient_place(saliency)
    top = math.trunc(min(max(0.0, centre[0] * height - high / 2), height - high))
    left = math.trunc(min(max(0.0, centre[1] * width - wide / 2), width - wide))
    return pixels[..., top : top + high, left : left + wide]
