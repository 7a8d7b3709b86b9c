"""The command on published layouts at tiny size: official, diffusers and ComfyUI, any C with any B."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import published_folders
import pytest
from PIL import Image

from triptych.apps.cli.main import run

SMALL = ("--size", "128x192", "--steps", "2", "--decoder-steps", "2", "--seed", "5", "--dtype", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in three layouts. ComfyUI's files hold no tokenizer; one is put beside them."""
    root = tmp_path_factory.mktemp("published")
    comfyui = published_folders.write_comfyui(root / "comfyui")
    published_folders.write_tokenizer(comfyui / "tokenizer")
    return {
        "official": published_folders.write_official(root / "official"),
        "diffusers": published_folders.write_diffusers(root / "diffusers"),
        "comfyui": comfyui,
    }


def picture(out: Path, *arguments: str) -> np.ndarray:
    assert run(["generate", "a red apple", *SMALL, "--out", str(out), *arguments]) == 0
    (file,) = out.iterdir()
    with Image.open(file) as image:
        assert image.size == (128, 192)
        return np.asarray(image).astype(int)


def test_three_layouts_of_the_same_weights_give_the_same_picture(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    official, diffusers, comfyui = (
        picture(tmp_path / layout, "--model", str(folder)) for layout, folder in folders.items()
    )
    assert np.abs(official - diffusers).max() <= 1
    assert np.abs(official - comfyui).max() <= 1
    assert official.std() > 0


def test_any_stage_c_goes_with_any_stage_b(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = picture(tmp_path / "plain", "--model", str(folders["official"]))
    mixed = picture(
        tmp_path / "mixed",
        "--model",
        str(folders["diffusers"]),
        "--stage-c",
        str(folders["official"] / "stage_c.safetensors"),
        "--stage-b",
        str(folders["comfyui"] / "stable_cascade_stage_b.safetensors"),
    )
    assert np.abs(plain - mixed).max() <= 1


def test_low_memory_gives_the_same_picture(folders: dict[str, Path], tmp_path: Path) -> None:
    usual = picture(tmp_path / "usual", "--model", str(folders["diffusers"]))
    frugal = picture(tmp_path / "frugal", "--model", str(folders["diffusers"]), "--low-memory")
    assert np.abs(usual - frugal).max() == 0


def test_a_long_prompt_is_read_to_its_end(folders: dict[str, Path], tmp_path: Path) -> None:
    start = "a very long story about an apple that goes on and on and never comes to an end " * 2
    model = ("--model", str(folders["official"]), *SMALL)
    for word in ("red", "blue"):
        assert run(["generate", start + word, *model, "--out", str(tmp_path / word)]) == 0
    red, blue = (next((tmp_path / word).iterdir()).read_bytes() for word in ("red", "blue"))
    assert red != blue


def test_parts_that_are_swapped_are_named(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = str(folders["official"] / "stage_b.safetensors")
    arguments = ["--model", str(folders["official"]), "--stage-c", swapped, "--out", str(tmp_path / "out")]
    assert run(["generate", "x", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Stage B" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
