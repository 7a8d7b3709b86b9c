import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from triptych.data.shapes import BACKGROUNDS, CLASHES, HELDOUT, draw_shapes, write_shapes
from triptych.data.shards import ShardIndex

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"
MANY = [draw_shapes(seed) for seed in range(400)]


def looks(sample) -> set[tuple[str, str]]:
    return {(o["colour"], o["shape"]) for o in sample.meta["objects"]}


def test_a_picture_is_a_function_of_its_seed() -> None:
    for seed in (0, 7, 10**9):
        first, second = draw_shapes(seed), draw_shapes(seed)
        assert first.captions == second.captions
        assert first.meta == second.meta
        assert (np.asarray(first.image) == np.asarray(second.image)).all()
    assert len({sample.image.tobytes() for sample in MANY}) == len(MANY)


def test_held_out_pairs_appear_only_when_asked_for() -> None:
    assert not any(looks(sample) & HELDOUT for sample in MANY)
    for seed in range(100):
        assert len(looks(draw_shapes(seed, heldout=True)) & HELDOUT) == 1


def test_all_kinds_shapes_colours_and_backgrounds_appear() -> None:
    kinds = Counter(sample.meta["kind"] for sample in MANY)
    assert set(kinds) == {"single", "pair", "same", "triple"}
    assert kinds["pair"] > kinds["single"] > kinds["same"]
    assert {sample.meta["background"] for sample in MANY} == set(BACKGROUNDS)
    pairs = set().union(*(looks(sample) for sample in MANY))
    assert len({colour for colour, _ in pairs}) == 11
    assert len({shape for _, shape in pairs}) == 8


def test_colours_stand_out_from_the_background() -> None:
    for sample in MANY:
        assert not {colour for colour, _ in looks(sample)} & CLASHES[sample.meta["background"]]


@pytest.mark.parametrize(("width", "height"), [(256, 256), (384, 192), (192, 384), (64, 64)])
def test_objects_lie_inside_and_their_boxes_are_exact(width: int, height: int) -> None:
    for seed in range(40):
        sample = draw_shapes(seed, width, height)
        assert sample.image.size == (width, height)
        pixels = np.asarray(sample.image).astype(int)
        different = (pixels != pixels[0, 0]).any(2)
        covered = np.zeros_like(different)
        for thing in sample.meta["objects"]:
            x0, y0, x1, y1 = thing["bbox"]
            assert 0 < x0 < x1 < width
            assert 0 < y0 < y1 < height
            covered[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
        assert not (different & ~covered).any()


def test_relations_agree_with_the_centres() -> None:
    for sample in MANY:
        objects = sample.meta["objects"]
        for relation in sample.meta["relations"]:
            axis = 0 if relation["relation"] == "left of" else 1
            assert objects[relation["subject"]]["center"][axis] < objects[relation["object"]]["center"][axis]


def test_captions_name_every_object_and_end_in_the_right_order() -> None:
    for sample in MANY:
        objects = sample.meta["objects"]
        for caption in sample.captions:
            assert all(o["colour"] in caption and o["shape"] in caption for o in objects)
            if "background" in caption:
                assert f"{sample.meta['background']} background" in caption
            if " and " not in caption and "between" not in caption and sample.meta["kind"] == "pair":
                first, second = (f"{o['colour']} {o['shape']}" for o in objects)
                swapped = " right of " in caption or " below " in caption
                assert (caption.index(second) < caption.index(first)) == swapped


def test_the_wording_is_that_of_the_published_set() -> None:
    """Every caption of the published pictures comes out word for word when their objects are described."""
    wordings = {wording(c, sample.meta) for sample in MANY for c in sample.captions}
    shapes = ShardIndex(FIXTURE, keep=lambda meta: meta.get("source") == "procedural")
    published = {wording(c, sample.meta) for sample in shapes for c in sample.captions}
    assert published <= wordings


def wording(caption: str, meta) -> str:
    caption = caption.replace(f"a {meta['background']} background", "a BACK background")
    for thing in meta["objects"]:
        for value, name in ((thing["colour"], "C"), (thing["size"], "Z"), (thing["shape"], "S")):
            caption = caption.replace(value, name)
    return caption.replace("an C", "a C").replace("Ses", "Ss")


def test_a_written_shard_reads_back(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes.tar", count=4, seed=11)
    write_shapes(tmp_path / "again.tar", count=4, seed=11)
    assert (tmp_path / "shapes.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    index = ShardIndex(tmp_path / "shapes.tar")
    for number, sample in enumerate(index):
        drawn = draw_shapes(11 + number)
        assert sample.captions == drawn.captions
        assert sample.meta == drawn.meta
        assert (np.asarray(sample.image) == np.asarray(drawn.image)).all()
