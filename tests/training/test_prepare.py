"""`triptych prepare`: folders, tars and datasets become shards; what is left out is told with its reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.cli.main import run
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
