"""The shapes judge is right about true pictures, about soft and noisy ones, and about what is wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from triptych.data.shapes import COLOURS, draw_shapes
from triptych.data.shards import Sample, ShardIndex
from triptych.evaluation.judges import judge_shapes, name_outline, nearest_colour, see_shapes, to_lab

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"


def looks(sample: Sample) -> Counter[tuple[str, str]]:
    return Counter((o["colour"], o["shape"]) for o in sample.meta["objects"])


def seen(image: Image.Image) -> Counter[tuple[str, str]]:
    return Counter((s.colour, s.shape) for s in see_shapes(image).objects)


def is_right(sample: Sample, image: Image.Image | None = None) -> bool:
    meta = sample.meta
    image = sample.image if image is None else image
    return judge_shapes(image, meta["objects"], meta["relations"], meta["background"]).right


def blurred(image: Image.Image, seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2))


def noisy(image: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 8, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def shrunk(image: Image.Image, seed: int) -> Image.Image:
    return image.resize((128, 128))


def faded(image: Image.Image, seed: int) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, (200, 200, 200)), 0.15)


def test_published_pictures_are_read_without_a_mistake() -> None:
    shapes = ShardIndex(FIXTURE, keep=lambda meta: meta.get("source") == "procedural")
    assert all(is_right(sample) for sample in shapes)


def test_drawn_pictures_are_read_without_a_mistake() -> None:
    wrong = [seed for seed in range(60) if not is_right(draw_shapes(seed))]
    assert len(wrong) <= 1, wrong


def test_held_out_pairs_are_read_as_well_as_others() -> None:
    assert all(is_right(draw_shapes(seed, heldout=True)) for seed in range(20))


@pytest.mark.parametrize("spoil", [blurred, noisy, shrunk, faded])
def test_soft_and_noisy_pictures_are_read(spoil) -> None:
    samples = [draw_shapes(seed) for seed in range(25)]
    right = sum(is_right(s, spoil(s.image, seed)) for seed, s in enumerate(samples))
    assert right >= 24


def test_other_canvases_and_sizes_are_read() -> None:
    for seed in range(8):
        assert is_right(draw_shapes(seed, 384, 192))
        assert is_right(draw_shapes(seed, 512, 512))


def test_boxes_are_where_the_objects_are() -> None:
    for seed in range(10):
        sample = draw_shapes(seed, 320, 320)
        objects = sorted(sample.meta["objects"], key=lambda o: o["bbox"][0] + o["bbox"][2])
        found = sorted(see_shapes(sample.image).objects, key=lambda s: s.box[0] + s.box[2])
        for thing, one in zip(objects, found, strict=True):
            assert one.box == pytest.approx(thing["bbox"], abs=5)


def test_an_empty_picture_holds_nothing() -> None:
    seeing = see_shapes(Image.new("RGB", (256, 256), (217, 242, 217)))
    assert seeing.objects == ()
    assert seeing.background == "pale green"
    assert not judge_shapes(Image.new("RGB", (64, 64)), [{"shape": "star", "colour": "red"}], []).right


def test_shapes_of_no_known_kind_are_called_unknown() -> None:
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.line([(30, 200), (80, 60), (120, 200), (160, 60), (220, 200)], fill=(220, 38, 38), width=12)
    assert seen(image) == {("red", "unknown"): 1}
    draw.rectangle((0, 0, 256, 256), fill="white")
    draw.rectangle((60, 60, 180, 180), fill=(40, 90, 220))
    draw.rectangle((90, 90, 150, 150), fill="white")  # a frame: a hole, but no ring
    assert seen(image) == {("blue", "unknown"): 1}


def test_touching_objects_of_two_colours_are_two() -> None:
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 80, 120, 180), fill=COLOURS["green"])
    draw.ellipse((115, 80, 215, 180), fill=COLOURS["purple"])
    assert seen(image) == {("green", "square"): 1, ("purple", "circle"): 1}


def test_turned_outlines_keep_their_names() -> None:
    for seed in range(60):
        sample = draw_shapes(seed)
        if sample.meta["kind"] == "single" and sample.meta["objects"][0]["size"] == "large":
            paper = sample.image.getpixel((0, 0))
            turned = sample.image.rotate(25, Image.Resampling.BICUBIC, fillcolor=paper)
            assert seen(turned) == looks(sample)


def test_verdicts_tell_what_is_wrong() -> None:
    sample = next(s for s in map(draw_shapes, range(50)) if s.meta["kind"] == "pair")
    objects, relations = sample.meta["objects"], sample.meta["relations"]
    colour = next(c for c in COLOURS if c not in {o["colour"] for o in objects})
    other = [{**objects[0], "colour": colour}, objects[1]]
    verdict = judge_shapes(sample.image, other, relations, "pale pink")
    assert (verdict.right, verdict.colours, verdict.shapes, verdict.count) == (False, False, True, True)
    assert verdict.relations is False
    assert verdict.background is (sample.meta["background"] == "pale pink")
    verdict = judge_shapes(sample.image, objects[:1], [])
    assert (verdict.count, verdict.relations, verdict.background) == (False, None, None)
    assert verdict.seen.objects


def test_relations_must_hold_in_the_asked_direction() -> None:
    for sample in map(draw_shapes, range(24)):
        objects, relations = sample.meta["objects"], sample.meta["relations"]
        if sample.meta["kind"] != "pair":
            continue
        (relation,) = relations
        swapped = [{**relation, "subject": 1, "object": 0}]
        turned = [{**relation, "relation": "above" if relation["relation"] == "left of" else "left of"}]
        assert judge_shapes(sample.image, objects, relations).relations
        for wrong in (swapped, turned):
            verdict = judge_shapes(sample.image, objects, wrong)
            assert verdict.objects
            assert not verdict.relations
            assert not verdict.right


def test_lab_has_the_standard_values() -> None:
    lab = to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    assert lab[0] == pytest.approx([100, 0, 0], abs=0.01)
    assert lab[1] == pytest.approx([0, 0, 0], abs=0.01)
    assert lab[2] == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert nearest_colour(to_lab(np.array([200, 60, 50])), COLOURS) == "red"


def test_outlines_of_tiny_masks_do_not_fail() -> None:
    for side in (2, 3, 5):
        assert name_outline(np.ones((side, side), dtype=bool))[0]
