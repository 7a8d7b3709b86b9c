"""Pictures in and out: ranges, names, metadata, and files that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych import images
from triptych.errors import DataError


def test_pixels_go_to_bytes_and_back_unchanged() -> None:
    levels = torch.arange(256).float().div(255).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    again = images.to_pixels(images.to_images(levels))
    assert torch.equal(again, levels)


def test_values_outside_the_range_are_clamped() -> None:
    (image,) = images.to_images(torch.tensor([-1.0, 2.0, float("nan")]).view(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 255, 0)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert images.flatten(clear).getpixel((0, 0)) == (255, 255, 255)


@settings(max_examples=500, deadline=None)
@given(st.text(), st.integers(0, 2**63 - 1))
def test_any_prompt_gives_a_usable_file_name(prompt: str, seed: int) -> None:
    stem = images.picture_stem(prompt, seed)
    assert stem.endswith(f"-{seed}")
    assert not set(stem) & set('/\\:*?"<>|\0 \n')
    assert not stem.startswith((".", "-"))
    assert len(stem.encode()) < 200


def test_metadata_survives_a_png(tmp_path: Path) -> None:
    metadata = {"request": {"prompt": 'ein Apfel 🍎 – "rot"', "seed": 7}}
    path = images.save_png(tmp_path, "apple", Image.new("RGB", (4, 4), "red"), metadata)
    assert images.read_metadata(path) == metadata
    assert [entry.name for entry in tmp_path.iterdir()] == ["apple.png"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    paths = [images.write_new(tmp_path, "a", ".png", bytes([n])) for n in range(3)]
    assert [path.name for path in paths] == ["a.png", "a-2.png", "a-3.png"]
    assert [path.read_bytes() for path in paths] == [b"\0", b"\1", b"\2"]


def test_nothing_is_overwritten_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    names = [images.write_new(tmp_path, "a", ".png", b"x").name for _ in range(2)]
    assert names == ["a.png", "a-2.png"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names[::-1]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        images.write_new(tmp_path, "a", ".png", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such picture"), (b"", "cannot be read"), (b"\x89PNG\r\n\x1a\nxx", "cannot be read")],
)
def test_unreadable_pictures_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.png"
    if content is not None:
        path.write_bytes(content)
    for read in (images.read_picture, images.read_metadata):
        with pytest.raises(DataError, match=message):
            read(path)


def test_a_foreign_png_has_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    with pytest.raises(DataError, match="holds no triptych settings"):
        images.read_metadata(tmp_path / "p.png")


def test_a_grid_holds_every_picture() -> None:
    colours = ["red", "green", "blue"]
    sheet = images.grid([Image.new("RGB", (2, 2), colour) for colour in colours], columns=2)
    assert sheet.size == (4, 4)
    assert [sheet.getpixel(at) for at in ((0, 0), (2, 0), (0, 2), (2, 2))] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]
