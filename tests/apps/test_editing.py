"""`vary`, `img2img`, `encode`, `decode`, `reconstruct` as people run them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.cli.main import run
from triptych.data.shapes import draw_shapes
from triptych.images import read_metadata


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    draw_shapes(3, 64, 64).image.save("photo.png")
    draw_shapes(8, 64, 64).image.save("other.png")
    return tmp_path


def command(model: Path, *arguments: str) -> int:
    return run([*arguments, "--model", str(model), "--dtype", "float32"])


def pictures(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_vary_makes_pictures_named_after_the_photo(tiny_cascade: Path, folder: Path) -> None:
    options = ("--count", "2", "--seed", "7", "--out", "new")
    assert command(tiny_cascade, "vary", "photo.png", "--reference", "other.png:0.5", *options) == 0
    assert pictures("new") == ["photo-7.png", "photo-8.png"]
    first, second = (Path("new", name).read_bytes() for name in pictures("new"))
    assert first != second
    sources = read_metadata("new/photo-7.png")["request"]["sources"]
    assert [(s["role"], s["file"], s["weight"]) for s in sources] == [
        ("reference", "photo.png", 1.0),
        ("reference", "other.png", 0.5),
    ]
    assert command(tiny_cascade, "vary", "photo.png", "a red apple", "--out", "new", "--seed", "7") == 0
    assert "a-red-apple-7.png" in pictures("new")


@pytest.mark.parametrize("again", ["generate", "vary"])
def test_a_variation_is_repeated_bit_for_bit(tiny_cascade: Path, folder: Path, again: str) -> None:
    assert command(tiny_cascade, "vary", "photo.png", "--count", "3", "--seed", "7", "--out", "a") == 0
    assert run([again, "--like", "a/photo-8.png", "--out", "b"]) == 0
    assert Path("a/photo-8.png").read_bytes() == Path("b/photo-8.png").read_bytes()
    assert run(["vary", "--like", "a/photo-8.png", "--image-weight", "0.5", "--out", "c"]) == 0
    assert read_metadata("c/photo-8.png")["request"]["sources"][0]["weight"] == 0.5
    assert Path("a/photo-8.png").read_bytes() != Path("c/photo-8.png").read_bytes()


def test_repeating_needs_the_same_photo(
    tiny_cascade: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tiny_cascade, "vary", "photo.png", "--seed", "7", "--out", "a") == 0
    shutil.move("photo.png", "moved.png")
    assert run(["generate", "--like", "a/photo-7.png", "--out", "b"]) == 2
    assert "No such picture: photo.png. It is the reference of this request" in capsys.readouterr().err
    shutil.copy("other.png", "photo.png")
    assert run(["generate", "--like", "a/photo-7.png", "--out", "b"]) == 2
    assert "photo.png is not the file that was used" in capsys.readouterr().err
    assert not Path("b").exists()
    assert run(["vary", "moved.png", "--like", "a/photo-7.png", "--out", "b"]) == 0
    with Image.open("a/photo-7.png") as one, Image.open("b/moved-7.png") as other:
        assert one.tobytes() == other.tobytes()


def test_img2img_from_reconstruction_to_plain_generation(tiny_cascade: Path, folder: Path) -> None:
    prompt, options = "a red apple", ("--seed", "7", "--size", "64x48")
    for strength in ("0", "0.5", "1"):
        arguments = ("img2img", "photo.png", prompt, "--strength", strength, *options, "--out", strength)
        assert command(tiny_cascade, *arguments) == 0
    assert command(tiny_cascade, "reconstruct", "photo.png", prompt, *options, "--out", "r") == 0
    assert command(tiny_cascade, "generate", prompt, *options, "--out", "g") == 0
    shown = {name: Image.open(f"{name}/a-red-apple-7.png").tobytes() for name in ("0", "0.5", "1", "r", "g")}
    assert shown["0"] == shown["r"]
    assert shown["1"] == shown["g"]
    assert len(set(shown.values())) == 3
    assert run(["img2img", "--like", "0.5/a-red-apple-7.png", "--out", "again"]) == 0
    assert Path("again/a-red-apple-7.png").read_bytes() == Path("0.5/a-red-apple-7.png").read_bytes()


def test_encode_decode_and_reconstruct_agree(
    tiny_cascade: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tiny_cascade, "encode", "photo.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["size"], told["latents"]) == ("photo.safetensors", "64x64", "16x2x2")
    assert (told["compression"], told["per side"]) == (192, 32)
    decoded = ("decode", "photo.safetensors", "--compare", "photo.png", "--seed", "7", "--out", "d", "--json")
    assert command(tiny_cascade, *decoded) == 0
    told = json.loads(capsys.readouterr().out)["pictures"][0]
    assert command(tiny_cascade, "reconstruct", "photo.png", "--seed", "7", "--out", "r") == 0
    line = capsys.readouterr().out.splitlines()[0]
    shown = re.fullmatch(r"r/photo-7.png  seed 7  compression 192  per side 32  psnr (\S+)  ssim (\S+)", line)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(told["psnr"], rel=1e-3)
    with Image.open("d/photo-7.png") as one, Image.open("r/photo-7.png") as other:
        assert one.tobytes() == other.tobytes()
    assert run(["decode", "--like", "d/photo-7.png", "--out", "again"]) == 0
    assert Path("again/photo-7.png").read_bytes() == Path("d/photo-7.png").read_bytes()


def test_latents_of_stage_a_come_back_without_stage_b(
    tiny_cascade: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("encode", "photo.png", "--stage", "b", "--out", "b.safetensors", "--check")
    assert command(tiny_cascade, *arguments) == 0
    assert "latents 4x16x16" in capsys.readouterr().out
    for seed in ("1", "2"):
        assert command(tiny_cascade, "decode", "b.safetensors", "--seed", seed, "--out", "d") == 0
    with Image.open("d/b-1.png") as one, Image.open("d/b-2.png") as other:
        assert one.tobytes() == other.tobytes()  # no noise was needed


MISTAKES = [
    (["vary"], "A picture is needed, for example: triptych vary photo.png"),
    (["img2img"], "A picture is needed, for example: triptych img2img photo.png"),
    (["reconstruct"], "A picture is needed"),
    (["decode"], "A file of latents is needed"),
    (["decode", "photo.png"], "photo.png is a PNG picture. A .safetensors file was expected."),
    (["vary", "none.png"], "No such picture: none.png."),
    (["vary", "photo.png", "--image-weight", "-1"], "a number from 0 to 100, not -1.0"),
    (["vary", "photo.png", "--reference", "none.png:2"], "No such picture: none.png."),
    (["img2img", "photo.png", "--strength", "2"], "strength = 2.0"),
    (["img2img", "text.png"], "text.png cannot be read as a picture: its format is not known"),
    (["reconstruct", "photo.png", "--size", "50x50"], "the nearest sizes are 48x48 and 56x56"),
    (["encode", "photo.png", "--stage", "a"], '--stage is c or b, not "a"'),
    (["encode", "photo.png", "--out", "other.png"], "other.png is there already"),
    (["encode", "."], ". is a folder; a picture file was expected."),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_each_mistake_has_its_sentence(
    tiny_cascade: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("text.png").write_text("not a picture")
    assert command(tiny_cascade, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_packaged_model_keeps_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_shapes(3).image.save("shape.png")
    assert run(["reconstruct", "shape.png", "--seed", "1", "--out", "r", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pictures"][0]
    assert told["psnr"] > 12
    with Image.open("r/shape-1.png") as image:
        assert image.size == (256, 256)
    assert run(["vary", "shape.png", "--seed", "1", "--out", "v", "--steps", "4"]) == 0
    assert run(["img2img", "shape.png", "a blue star", "--seed", "1", "--out", "i", "--steps", "4"]) == 0
    assert pictures("v") + pictures("i") == ["shape-1.png", "a-blue-star-1.png"]
