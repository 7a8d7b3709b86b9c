"""`triptych prepare`: folders, tars and datasets become shards; what is left out is told with its reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.cli.main import run
from triptych.data.batches import load_batch, order_of
from triptych.data.buckets import make_buckets
from triptych.data.shards import ShardIndex
from triptych.errors import DataError
from triptych.training.prepare import prepare


def picture(width: int, height: int, colour: str = "red", kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures with every kind of caption, and every kind of trouble."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    (root / "a.png").write_bytes(picture(200, 100))
    (root / "a.txt").write_text("a red bar\nsomething wide\n")
    (root / "b.jpg").write_bytes(picture(100, 200, "blue", "JPEG"))
    (root / "metadata.jsonl").write_text(
        '{"file_name": "b.jpg", "text": "a blue bar", "licence": "CC0-1.0"}\n'
    )
    (root / "more" / "large.webp").write_bytes(picture(1000, 1000, "green", "WEBP"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "turned.jpg").write_bytes(picture(120, 240, "yellow", "JPEG", exif=exif))
    (root / "again.png").write_bytes(picture(200, 100))
    (root / "small.png").write_bytes(picture(10, 10))
    (root / "cut.png").write_bytes(picture(300, 300)[:60])
    (root / "notes.pdf").write_bytes(b"%PDF")
    return root


def test_a_folder_becomes_shards_and_trouble_is_listed(folder: Path, tmp_path: Path) -> None:
    made = prepare(str(folder), tmp_path / "data", size=256, caption="a picture")
    samples = {sample.meta["source"]: sample for sample in ShardIndex(tmp_path / "data")}
    assert set(samples) == {"a.png", "b.jpg", "more/large.webp", "turned.jpg"}
    assert samples["b.jpg"].captions == ("a blue bar",)
    assert samples["b.jpg"].licence == "CC0-1.0"
    assert samples["more/large.webp"].captions == ("a picture",)
    assert samples["more/large.webp"].image.size == (256, 256)
    assert samples["turned.jpg"].image.size == (240, 120)
    reasons = dict(made.skipped)
    assert reasons.keys() == {"again.png", "small.png", "cut.png", "notes.pdf"}
    assert "same file as a.png" in reasons["again.png"]
    assert "less than 64" in reasons["small.png"]
    assert "not a picture" in reasons["notes.pdf"]
    index = json.loads((tmp_path / "data" / "prepared.json").read_text())
    assert index["pictures"] == made.pictures == 4
    assert len((tmp_path / "data" / "skipped.txt").read_text().splitlines()) == 4


def test_captions_beside_a_picture_are_all_kept_and_its_bytes_unchanged(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder), tmp_path / "data", size=256)
    index = ShardIndex(tmp_path / "data")
    number = next(i for i in range(len(index)) if index.meta(i)["source"] == "a.png")
    assert index[number].captions == ("a red bar", "something wide")
    assert index.content(number)[0] == (folder / "a.png").read_bytes()
    assert index.meta(number)["bucket"] == "352x160"


def test_tars_and_what_prepare_wrote_can_be_prepared_again(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder), tmp_path / "first", size=256)
    with tarfile.open(tmp_path / "first" / "shard-00000.tar", "a") as tar:
        member = tarfile.TarInfo("lone.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"text"))
    made = prepare(str(tmp_path / "first"), tmp_path / "second", size=256)
    assert made.pictures == 4
    assert ("lone", "has a caption but no picture") in made.skipped
    first, second = (sorted(s.captions for s in ShardIndex(tmp_path / name)) for name in ("first", "second"))
    assert first == second


def test_a_dataset_of_the_library_is_read_as_a_stream(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": picture(96, 96, c), "path": None} for c in ("red", "blue")],
        "text": ["one", "two"],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    made = prepare(f"file://{tmp_path}/set/train.parquet", tmp_path / "data", size=128)
    assert made.pictures == 2
    assert sorted(s.caption for s in ShardIndex(tmp_path / "data")) == ["one", "two"]


def test_shards_are_whole_or_not_there(folder: Path, tmp_path: Path) -> None:
    def stop(done: int, of: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), tmp_path / "data", size=256, progress=stop)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_command_tells_and_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert run(["prepare", str(folder), str(out), "--size", "256"]) == 0
    told = capsys.readouterr().out
    assert "4 pictures in 1 shard" in told
    assert "4 left out" in told
    assert run(["prepare", str(folder), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["prepare", str(folder), str(out), "--force", "--square"]) == 0
    (out / "mine.txt").write_text("keep me")
    assert run(["prepare", str(folder), str(out), "--force"]) == 2
    assert (out / "mine.txt").exists()
    assert run(["prepare", str(tmp_path / "none.tar"), str(tmp_path / "x")]) == 2
    assert "There is no file or folder" in capsys.readouterr().err


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no readable picture"):
        prepare(str(tmp_path / "in"), tmp_path / "out")


def test_a_bucket_behind_a_url_is_read_like_a_folder(folder: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/pictures", recursive=True)
    try:
        made = prepare("memory://bucket/pictures", tmp_path / "remote", size=256)
    finally:
        store.rm("/bucket", recursive=True)
    prepare(str(folder), tmp_path / "local", size=256)
    remote, local = (
        {s.meta["source"]: (s.captions, s.image.tobytes()) for s in ShardIndex(tmp_path / name)}
        for name in ("remote", "local")
    )
    assert remote == local
    assert {key for key, _ in made.skipped} == {"again.png", "small.png", "cut.png", "notes.pdf"}
    with pytest.raises(DataError, match="no files behind memory://bucket/none"):
        prepare("memory://bucket/none", tmp_path / "none")


def test_datasets_that_the_library_saved_and_tars_behind_urls(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": picture(96, 80), "path": None}], "caption": ["one"]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    prepare(str(tmp_path / "saved"), tmp_path / "a", size=128)
    assert [sample.caption for sample in ShardIndex(tmp_path / "a")] == ["one"]
    prepare(str(folder), tmp_path / "tars", size=256)
    prepare(f"file://{tmp_path}/tars/shard-00000.tar", tmp_path / "b", size=256)
    first, second = (sorted(s.captions for s in ShardIndex(tmp_path / name)) for name in ("tars", "b"))
    assert first == second


def test_masks_travel_with_their_pictures(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    mask = Image.new("L", (200, 200), 0)
    mask.paste(255, (0, 0, 100, 200))
    Image.new("RGB", (200, 200), "red").save(root / "a.png")
    mask.save(root / "a-mask.png")
    clear = Image.new("RGBA", (800, 800), "blue")
    clear.putalpha(mask.resize((800, 800)))
    clear.save(root / "large.png")  # is stored anew, smaller
    made = prepare(str(root), tmp_path / "out", size=128)
    assert made.pictures == 2
    assert made.skipped == []
    for sample in ShardIndex(tmp_path / "out"):
        assert sample.mask is not None
        middle = sample.mask.height // 2
        assert (sample.mask.getpixel((5, middle)), sample.mask.getpixel((sample.mask.width - 5, middle))) == (
            255,
            0,
        )


def test_a_smart_crop_keeps_what_stands_out(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    wide = Image.new("RGB", (400, 100), "white")
    wide.paste("red", (330, 20, 390, 80))
    wide.save(root / "a.png")
    assert (
        run(["prepare", str(root), str(tmp_path / "out"), "--size", "100", "--square", "--crop", "smart"])
        == 0
    )
    index = ShardIndex(tmp_path / "out")
    (down, across) = index[0].focus
    assert down == pytest.approx(0.5, abs=0.05)
    assert across == pytest.approx(0.9, abs=0.05)
    buckets = make_buckets(96, (1.0,))
    order = order_of(index, buckets, 1)
    smart = load_batch(index, order.plan(0), buckets, random_crop=False).pixels[0]
    red = (smart[0] > 0.8) & (smart[1] < 0.2)
    assert red.float().mean() > 0.3
    assert run(["prepare", str(root), str(tmp_path / "x"), "--crop", "clever"]) == 2
