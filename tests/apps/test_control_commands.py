"""The commands with a ControlNet: each writes its picture, repeats it, and says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from controlnets import controlled_cascade, write_controlnet
from PIL import Image, ImageDraw

from triptych.apps.cli.main import run

QUICK = ["--seed", "5", "--steps", "2", "--decoder-steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controlled_cascade(tiny_cascade, tmp_path_factory.mktemp("controlled"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (72, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="red", outline="black", width=3)
    image.save(tmp_path / "photo.png")
    mask = Image.new("L", image.size)
    mask.paste(255, (20, 20, 50, 50))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png"


def pictures(model: Path, out: Path, *arguments: str) -> list[Path]:
    status = run([*arguments, "--model", str(model), "--out", str(out), *QUICK])
    assert status == 0
    return sorted(out.glob("*.png"))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


COMMANDS = {
    "inpaint": (["--mask", "mask.png"], (72, 64)),
    "inpaint box": (["--box", "10,10,30,30"], (72, 64)),
    "inpaint salient": (["--salient", "--threshold", "0.3"], (72, 64)),
    "outpaint": (["--left", "24", "--top", "8"], (96, 72)),
    "canny": (["--control-weight", "0.7", "--control-end", "0.5"], (72, 64)),
    "canny sketch": (["--sketch"], (72, 64)),
    "upscale": ([], (144, 128)),
    "upscale 4": (["--factor", "4"], (288, 256)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_leaves_exactly_one_picture_that_can_be_repeated(name, model, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, size = COMMANDS[name]
    (path,) = pictures(model, tmp_path / "out", name.split()[0], str(photo), "a star", *options)
    made = read(path)
    assert made.shape[1::-1] == size
    assert path.name == "a-star-5.png"
    assert run([name.split()[0], "--like", str(path), "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(read(tmp_path / "again" / path.name), made)


def test_a_repeated_picture_can_have_another_weight(model, photo, tmp_path):
    (path,) = pictures(model, tmp_path / "out", "canny", str(photo), "a star")
    for weight, same in (("1", True), ("0.2", False)):
        out = tmp_path / weight
        assert run(["canny", "--like", str(path), "--control-weight", weight, "--out", str(out)]) == 0
        (again,) = out.glob("*.png")
        assert np.array_equal(read(again), read(path)) == same


def test_the_hint_is_saved_beside_the_picture(model, photo, tmp_path, capsys):
    found = pictures(model, tmp_path / "out", "canny", str(photo), "a star", "--save-hint")
    assert [path.name for path in found] == ["a-star-5.hint.png", "a-star-5.png"]
    edges = read(found[0])[..., 0]
    assert edges.shape == (64, 96)  # what Stage C's latents cover
    assert 0 < (edges > 128).mean() < 0.3
    assert "Hint:" in capsys.readouterr().err


def test_generate_takes_several_controls_and_upscales_latents(model, photo, tmp_path, capsys):
    own = write_controlnet(tmp_path / "own.safetensors", "palette")
    controls = [f"canny={photo},weight=0.5", f"{own}={photo},weight=0.8,start=0.1,end=0.9"]
    flags = [flag for control in controls for flag in ("--control", control)]
    (path,) = pictures(model, tmp_path / "out", "generate", "a star", *flags, "--upscale", "2", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [control["hint"] for control in told["request"]["controls"]] == ["canny", "palette"]
    assert told["request"]["controls"][1]["begin"] == 0.1
    assert read(path).shape == (128, 144, 3)


def test_a_control_command_takes_further_controls(model, photo, tmp_path, capsys):
    more = ["--control", f"palette={photo},end=0.5"]
    assert pictures(model, tmp_path / "out", "canny", str(photo), "a star", *more)
    assert "canny (weight 1, from 0 to 1), palette (weight 1, from 0 to 0.5)" in capsys.readouterr().out


WRONG = [
    (
        ["inpaint", "PHOTO"],
        "Say in one way what to draw anew: --mask FILE, --box x,y,width,height or --salient",
    ),
    (["inpaint", "PHOTO", "--box", "1,2,3"], '--box "1,2,3" is not x,y,width,height in pixels'),
    (["inpaint", "PHOTO", "--box", "900,2,3,3"], "holds no pixel of a picture of 72x64"),
    (["inpaint", "PHOTO", "--mask", "absent.png"], "No such picture: absent.png"),
    (["inpaint"], "A picture is needed, for example: triptych inpaint photo.png."),
    (["outpaint", "PHOTO"], "Say how far to go on"),
    (["canny", "absent.png"], "No such picture: absent.png"),
    (["canny", "PHOTO", "--low", "300"], "Canny's thresholds are 0 <= low <= high"),
    (["canny", "PHOTO", "--control-start", "0.8", "--control-end", "0.2"], "never acts"),
    (["canny", "PHOTO", "--controlnet", "absent"], "There is no ControlNet at absent"),
    (["canny", "PHOTO", "--control", "canny"], "is not of the form KIND=PICTURE"),
    (["canny", "PHOTO", "--control", "canny=x.png,loud=1"], '"loud=1" is none of weight=, start= and end='),
    (["upscale", "PHOTO", "--factor", "3"], "Pictures are made 2 or 4 times as large; --factor 3 was given"),
    (["identity", "PHOTO"], "Identity needs a face recogniser: give an ONNX file with --face-model"),
    (["identity", "PHOTO", "--face-model", "no.onnx"], "There is no face recogniser at no.onnx"),
    (["generate", "a star", "--upscale", "3"], "upscale = 3"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_what_cannot_be_has_its_sentence(arguments, said, model, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(photo) if one == "PHOTO" else one for one in arguments]
    assert run([*arguments, "--model", str(model), "--out", "out", *QUICK]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not list(tmp_path.glob("out/*.png"))
