"""Measures of obedience: right for known pictures, and complete for a cascade that obeys nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from controlnets import controlled_cascade
from PIL import Image, ImageDraw

from triptych import Cascade
from triptych.data.sources import DrawnShapes
from triptych.evaluation import control
from triptych.evaluation.control import edge_f1, edges, random_box

QUICK = {"steps": 1, "decoder_steps": 1}


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    folder = controlled_cascade(tiny_cascade, tmp_path_factory.mktemp("controlled"))
    return Cascade.load(folder, device="cpu", dtype="float32")


def ring(shift: int = 0) -> Image.Image:
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((60 + shift, 60, 160 + shift, 160), outline="black", width=4)
    return image


def test_f1_is_one_for_the_same_edges_and_falls_as_they_move():
    scores = [edge_f1(edges(ring()), edges(ring(shift))) for shift in (0, 2, 30)]
    assert scores[0] == 1
    assert scores[1] > 0.95
    assert scores[2] < 0.4
    nothing = torch.zeros(224, 224, dtype=torch.bool)
    assert edge_f1(edges(ring()), nothing) == 0
    assert edge_f1(nothing, nothing) == 1


def test_f1_is_what_counting_by_hand_gives():
    asked, got = (torch.zeros(20, 20, dtype=torch.bool) for _ in range(2))
    asked[5, :10] = True
    got[7, :5] = True  # five of ten, two pixels off: columns 0 to 6 of the asked ones are near
    got[18, :5] = True
    assert edge_f1(asked, got) == pytest.approx(2 * 0.5 * 0.7 / 1.2)


def test_boxes_lie_inside_and_repeat():
    for seed in range(20):
        x, y, width, height = random_box((64, 48), seed)
        assert 0 <= x <= 64 - width
        assert 0 <= y <= 48 - height
        assert (x, y, width, height) == random_box((64, 48), seed)


def test_every_measure_is_there(cascade):
    source = DrawnShapes(2)
    canny = control.evaluate_canny(cascade, source, 2, **QUICK)
    assert set(canny.measures) == {"f1, control", "f1, no control", "f1, reconstruction"}
    assert "obedience" in canny.numbers
    assert len(canny.images) == 2 * canny.columns
    holes = control.evaluate_inpainting(cascade, source, 2, **QUICK)
    assert {"distance, control", "psnr, opencv", "psnr, mean colour", "shape in a hole"} <= set(
        holes.measures
    )
    for kind in ("super_resolution", "pixel_super_resolution"):
        large = control.evaluate_super_resolution(cascade, source, 2, kind=kind, **QUICK)
        assert {"distance, control", "distance, bicubic", "psnr, control"} <= set(large.measures)
        assert {image.size for image in large.images} == {(64, 64)}
