"""Sources of training pictures: canvases of other shapes, and the mix of drawn shapes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from triptych.data.shapes import BACKGROUNDS, Mix
from triptych.data.sources import DrawnShapes, OnCanvases, plain_background, to_canvas
from triptych.evaluation.judges import judge_shapes
from triptych.training.config import check_settings
from triptych.training.sources import Pictures


def test_a_drawing_on_a_plain_background_keeps_all_of_it() -> None:
    drawn = DrawnShapes(40)
    for number, canvas in enumerate([(192, 288), (288, 192), (192, 192), (384, 256)] * 5):
        sample = drawn.read(number)
        wide = to_canvas(sample.image, *canvas)
        assert wide.size == canvas[::-1]
        meta = sample.meta
        assert judge_shapes(wide, meta["objects"], meta["relations"], meta["background"]).right, number


def test_a_photograph_is_cropped_not_framed() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert plain_background(noise) is None
    cropped = np.asarray(to_canvas(noise, 32, 64))
    assert np.array_equal(cropped, np.asarray(noise)[16:48])


def test_a_plain_background_is_named_by_its_colour() -> None:
    for sample in map(DrawnShapes(20).read, range(20)):
        assert plain_background(sample.image) == BACKGROUNDS[sample.meta["background"]]


def test_canvases_are_taken_in_turn_and_change_the_keys() -> None:
    source = OnCanvases(DrawnShapes(6), [(256, 256), (128, 256)])
    sizes = {source.read(index).image.size: source.size(index) for index in range(6)}
    assert sizes == {(256, 256): (256, 256), (256, 128): (128, 256)}
    assert len({source.key(index) for index in range(6)}) == 6
    assert source.key(0) != DrawnShapes(6).key(0)


def test_forced_canvases_get_their_share_of_both_kinds_of_pictures() -> None:
    raw = {
        "recipe": "stage_c", "out": "nowhere",
        "data": {"shapes": 200, "canvases": [[384, 256], [192, 192]], "canvas_share": 0.25},
    }  # fmt: skip
    pictures = Pictures(check_settings(raw, "here"))
    sizes = [pictures.source.size(index) for index in range(200)]
    assert sizes.count((256, 256)) == 150
    assert sizes.count((256, 384)) == sizes.count((192, 192)) == 25


def test_a_mix_decides_what_is_drawn_and_what_it_is_called() -> None:
    mix = Mix((("single", 1.0),), large=1.0)
    drawn, published = DrawnShapes(60, mix=mix), DrawnShapes(60)
    metas = [drawn.read(index).meta for index in range(60)]
    assert {meta["kind"] for meta in metas} == {"single"}
    assert {thing["size"] for meta in metas for thing in meta["objects"]} == {"large"}
    assert drawn.key(3) != published.key(3)
