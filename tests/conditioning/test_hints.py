"""Hints show what they are named for; masks mark what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from triptych.conditioning.hints import (
    KINDS,
    Tools,
    canny_hint,
    inpainting_hint,
    palette_hint,
    qr_hint,
    shrunk,
    sketch_hint,
    soft_edges_hint,
    thinned,
)
from triptych.conditioning.masks import (
    box_mask,
    contrast_saliency,
    mask_from_image,
    random_masks,
    saliency_mask,
    soft_edge,
)
from triptych.errors import RequestError
from triptych.images import flatten, to_pixels
from triptych.models.pidinet import PiDiNet, PiDiNetConfig


def square(side: int = 128, inner: tuple[int, int] = (40, 88), ink="black", paper="white") -> torch.Tensor:
    image = Image.new("RGB", (side, side), paper)
    ImageDraw.Draw(image).rectangle((inner[0], inner[0], inner[1], inner[1]), fill=ink)
    return to_pixels([image])


def outline(ink="black", paper="white", width: int = 6, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (128, 128), paper)
    ImageDraw.Draw(image).rectangle((30, 30, 98, 98), outline=ink, width=width)
    return image


def test_edges_lie_on_the_border_of_a_square_and_nowhere_else():
    hint = canny_hint(square())
    assert hint.shape == (1, 1, 128, 128)
    rows, columns = (hint[0, 0] > 0.3).nonzero(as_tuple=True)
    near = [(abs(at - 40) <= 2) | (abs(at - 88) <= 2) for at in (rows, columns)]
    assert bool((near[0] | near[1]).all())
    assert len(rows) > 100


def test_thresholds_decide_what_is_an_edge():
    faint = square(ink=(225, 225, 225))
    assert not canny_hint(faint).any()
    assert canny_hint(faint, 10, 20).any()
    with pytest.raises(RequestError, match="0 <= low <= high"):
        canny_hint(faint, 200, 100)


@pytest.mark.parametrize(
    "image",
    [
        outline(),
        outline("white", "black"),
        outline((0, 0, 0, 255), (0, 0, 0, 0), mode="RGBA"),
        outline(width=2),
    ],
    ids=["dark on white", "light on dark", "transparent paper", "thin lines"],
)
def test_a_sketch_becomes_one_thin_line_where_a_photo_of_it_has_two(image):
    lines = sketch_hint(to_pixels([flatten(image)]))
    crossings = (lines[0, 0, 64] > 0.02).int().diff().clamp_min(0).sum()
    assert int(crossings) == 2  # the left and the right stroke
    reached = (lines[0, 0] > 0.2).nonzero()
    assert reached.min() >= 26
    assert reached.max() <= 102


def test_an_empty_sketch_has_its_sentence():
    with pytest.raises(RequestError, match="shows no lines"):
        sketch_hint(torch.ones(1, 3, 64, 64))


def test_thinning_keeps_a_bar_in_one_piece():
    bar = np.zeros((20, 40), dtype=bool)
    bar[5:12, 4:36] = True
    line = thinned(bar)
    assert line[:, 12:28].sum(0).max() == 1
    assert line[:, 12:28].any(0).all()


def test_inpainting_shows_white_in_the_hole_and_the_mask_beside():
    pixels = torch.rand(2, 3, 32, 32)
    mask = box_mask((4, 8, 10, 6), (32, 32))
    hint = inpainting_hint(pixels, mask)
    assert hint.shape == (2, 4, 32, 32)
    assert (hint[:, :3, 8:14, 4:14] == 1).all()
    assert torch.equal(hint[:, 3:], mask.expand(2, -1, -1, -1))
    assert torch.equal(hint[:, :3, :8], pixels[..., :8, :])


def test_masks_come_from_files_and_boxes_or_say_why_not():
    half = Image.new("L", (64, 32))
    half.paste(255, (0, 0, 16, 32))
    mask = mask_from_image(half, (128, 64))
    assert mask.mean() == 0.25
    for call, said in (
        (lambda: mask_from_image(Image.new("L", (64, 64), 255), (128, 64)), "shapes differ"),
        (lambda: mask_from_image(Image.new("L", (64, 32)), (128, 64)), "black"),
        (lambda: box_mask((500, 0, 10, 10), (128, 64)), "holds no pixel"),
    ):
        with pytest.raises(RequestError, match=said):
            call()
    assert box_mask((-10, -10, 20, 20), (128, 64)).sum() == 100


def test_what_stands_out_is_masked_and_outpainting_masks_the_rest():
    pixels = square(256, (80, 176))
    inside, outside = saliency_mask(pixels), saliency_mask(pixels, inverted=True)
    assert inside[0, 0, 128, 128] == 1
    assert inside[0, 0, 8, 8] == 0
    assert outside[0, 0, 128, 128] == 0
    assert outside[0, 0, 8, 8] == 1
    assert contrast_saliency(pixels).max() == 1


def test_random_masks_follow_their_draws():
    pixels = square(64).expand(4, -1, -1, -1).clone()

    def masks(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return random_masks(pixels, lambda: torch.rand(4, generator=generator), box_share=0.5)

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))
    assert set(masks(3).unique().tolist()) <= {0.0, 1.0}


def test_the_soft_edge_is_nothing_outside_and_all_deep_inside():
    mask = box_mask((10, 10, 40, 40), (64, 64))
    weights = soft_edge(mask, 4)
    assert not weights[mask == 0].any()
    row = weights[0, 0, 30, 10:15].tolist()
    assert row == [0.25, 0.5, 0.75, 1.0, 1.0]
    thin = soft_edge(box_mask((10, 10, 40, 3), (64, 64)), 8)
    assert thin.max() == 1  # a line of three pixels is still drawn
    rim = soft_edge(box_mask((0, 0, 20, 64), (64, 64)), 4)
    assert (rim[0, 0, :, 0] == 1).all()  # beyond the border nothing has to be met


def test_other_hints():
    levels = qr_hint(square(224, (60, 160)))
    assert levels[0, 0, 110, 110] == 0
    assert levels[0, 0, 10, 10] == 1
    colours = palette_hint(square(64, (0, 63), ink="red"))
    assert torch.allclose(colours, torch.tensor([1.0, 0, 0])[:, None, None].expand(1, 3, 64, 64))
    edges = soft_edges_hint(torch.rand(1, 3, 64, 64), PiDiNet(PiDiNetConfig(8, 6)).eval(), 0.5, 3)
    assert edges.shape == (1, 1, 64, 64)
    assert shrunk(torch.rand(1, 3, 64, 64), 4, "area").shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.needs != ("faces",)])
def test_every_kind_is_made_of_training_pictures(name):
    tools = Tools(
        semantic=torch.nn.Conv2d(3, 16, 32, 32), edges=PiDiNet(PiDiNetConfig(8, 6)).eval(), box_share=0.5
    )
    with torch.no_grad():
        hint = KINDS[name].make(torch.rand(2, 3, 96, 128), lambda: torch.rand(2), tools)
    assert hint.shape[:2] == (2, KINDS[name].channels)
    assert hint.shape[-2:] == ((2, 4) if name == "super_resolution" else (96, 128))
