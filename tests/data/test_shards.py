import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.shards import ShardIndex, without_share_alike
from triptych.errors import DataError

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_fixture_reads_by_index() -> None:
    index = ShardIndex(FIXTURE)
    assert len(index) == 64
    assert index.broken == []
    sample = index[63]
    assert sample.key == index.key(63)
    assert sample.image.size == (256, 256)
    assert sample.image.mode == "RGB"
    assert sample.caption == sample.captions[0] == sample.meta["captions"][0]
    assert sample.licence
    assert index.size(63) == (256, 256)


def test_the_same_sample_comes_whatever_was_read_before() -> None:
    forward, backward = ShardIndex(FIXTURE), ShardIndex(FIXTURE)
    there = [np.asarray(forward[i].image) for i in range(64)]
    back = [np.asarray(backward[i].image) for i in reversed(range(64))][::-1]
    assert all((a == b).all() for a, b in zip(there, back, strict=True))


def test_threads_and_pickled_copies_read_the_same() -> None:
    index = ShardIndex(FIXTURE)
    alone = [index[i].caption for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: index[i].caption, range(64))) == alone
    copy = pickle.loads(pickle.dumps(index))
    assert copy[5].caption == alone[5]


def test_predicates_filter_on_json() -> None:
    index = ShardIndex(FIXTURE, keep=lambda meta: meta["license"] == "CC0-1.0")
    assert len(index) == 16
    assert index.filtered == 48
    assert len(ShardIndex(FIXTURE, keep=without_share_alike)) == 64


def test_broken_samples_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "good.png": picture(),
            "good.txt": b"a red card",
            "damaged.png": picture()[:30],
            "damaged.txt": b"half a picture",
            "lonely.txt": b"no picture",
            "odd.png": picture(),
            "odd.json": b"[1, 2]",
        },
    )
    index = ShardIndex(shard)
    assert [sample.caption for sample in index] == ["a red card"]
    assert {broken.key for broken in index.broken} == {"lonely", "damaged", "odd"}
    with pytest.raises(DataError, match=r"a\.tar: sample damaged cannot be read"):
        index[1]
    assert index.read(1) is None
    assert len(index.broken) == 3
    assert index.size(1) is None


def test_a_truncated_shard_gives_what_is_whole(tmp_path: Path) -> None:
    short = tmp_path / "short.tar"
    short.write_bytes(FIXTURE.read_bytes()[:200_000])
    index = ShardIndex(short)
    assert 0 < len(index) < 64
    assert index.broken
    assert sum(1 for _ in index) + len(index.broken) >= len(index)


@pytest.mark.parametrize("cut", [0, 10, 511, 513])
def test_files_that_are_no_shards_are_one_clear_error(tmp_path: Path, cut: int) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(FIXTURE.read_bytes()[:cut] if cut != 511 else b"x" * 4000)
    with pytest.raises(DataError, match="No readable pictures"):
        ShardIndex(bad)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        ShardIndex(tmp_path / "nowhere")
    with pytest.raises(DataError, match="No shards were given"):
        ShardIndex([])


def test_plain_folders_with_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "b.txt").write_text("a card\n")
    (tmp_path / "sub" / "a.PNG").write_bytes(picture())
    (tmp_path / "sub" / "a.json").write_text(json.dumps({"captions": ["one", "two"]}))
    (tmp_path / "c.jpg").write_bytes(picture())
    (tmp_path / "notes.txt").write_text("not a caption")
    index = ShardIndex(tmp_path)
    assert {(s.key, s.captions) for s in index} == {("b", ("a card",)), ("sub/a", ("one", "two")), ("c", ())}
    assert index.broken == []


def test_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert ShardIndex(tmp_path)[0].image.getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_turned_as_their_exif_data_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    index = ShardIndex(tmp_path)
    assert index.size(0) == (30, 20)
    assert index[0].image.size == (20, 30)


def test_a_mask_is_a_file_beside_the_picture_or_its_opacity(tmp_path: Path) -> None:
    half = Image.new("L", (4, 4), 0)
    half.paste(255, (0, 0, 2, 4))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    half.save(tmp_path / "a-mask.png")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.putalpha(half.resize((8, 8), Image.Resampling.NEAREST))
    clear.save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "c.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "lone-mask.png")
    samples = {sample.key: sample for sample in ShardIndex(tmp_path)}
    assert set(samples) == {"a", "b", "c", "lone-mask"}
    assert samples["c"].mask is None
    assert samples["lone-mask"].mask is None
    for key in ("a", "b"):
        mask = samples[key].mask
        assert mask is not None
        assert mask.size == (8, 8)
        assert (mask.getpixel((0, 4)), mask.getpixel((7, 4))) == (255, 0)


def test_captions_are_read_without_pictures_and_marks_follow_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_text("one")
    index = ShardIndex(tmp_path)
    assert index.captions(0) == ("one",)
    before = index.mark()
    assert ShardIndex(tmp_path).mark() == before
    (tmp_path / "a.txt").write_text("another")
    assert ShardIndex(tmp_path).mark() != before


def test_a_picture_whose_size_is_unknown_is_listed(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "none.png").write_bytes(b"nothing")
    index = ShardIndex(tmp_path)
    assert [index.size(number) is None for number in range(2)] == [False, True]
    assert [broken.key for broken in index.broken] == ["none"]
