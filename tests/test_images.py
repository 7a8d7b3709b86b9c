"""Pictures in and out: ranges, names, metadata, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

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


def read(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Image.Image:
    image.save(tmp_path / name, **options)
    got = images.read_picture(tmp_path / name)
    assert got.mode == "RGB"
    return got


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int) -> None:
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpositions that a camera undoes
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    method = turned[orientation]
    stored = upright if method is None else upright.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read(tmp_path, stored, "p.jpg", exif=exif, quality=95)
    assert got.size == (48, 32)
    assert got.getpixel((5, 5))[1] < 60  # red
    assert got.getpixel((40, 25))[1] > 200  # white


def test_transparent_palettes_and_greys_lie_on_white(tmp_path: Path) -> None:
    clear = Image.new("LA", (2, 2), (0, 0))
    assert read(tmp_path, clear, "la.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    got = read(tmp_path, palette, "p.png", transparency=0)
    assert (got.getpixel((0, 0)), got.getpixel((1, 1))) == ((255, 255, 255), (0, 0, 255))
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert read(tmp_path, half, "h.png").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    got = read(tmp_path, Image.fromarray(levels), f"deep.{suffix}")
    assert [got.getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 100, 200, 255]


def test_other_kinds_of_pixels_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, Image.new("1", (2, 2), 1), "bits.png").getpixel((0, 0)) == (255, 255, 255)
    assert read(tmp_path, Image.new("L", (2, 2), 77), "grey.jpg").getpixel((0, 0)) == (77, 77, 77)
    light = Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32))
    assert read(tmp_path, light, "float.tif").getpixel((0, 0)) == (128, 128, 128)
    cyan = read(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "ink.jpg", quality=95)
    assert cyan.getpixel((4, 4))[0] < 10
    assert min(cyan.getpixel((4, 4))[1:]) > 240


def test_colours_of_another_profile_become_srgb(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red = Image.new("RGB", (2, 2), (200, 30, 30))
    assert read(tmp_path, red, "srgb.png", icc_profile=lab).getpixel((0, 0)) == (200, 30, 30)
    assert read(tmp_path, red, "broken.png", icc_profile=b"nonsense").getpixel((0, 0)) == (200, 30, 30)
    other = lab.replace(b"s\0R\0G\0B\0", b"r\0G\0R\0B\0").replace(b"\0s\0R\0G\0B", b"\0o\0t\0h\0e")
    assert b"s\0R\0G\0B" not in other  # the same colours under another name: converted, and unchanged
    got = read(tmp_path, red, "other.png", icc_profile=other).getpixel((0, 0))
    assert np.abs(np.subtract(got, (200, 30, 30))).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert images.read_picture(tmp_path / f"moving.{suffix}").getpixel((4, 4)) == (255, 0, 0)


def test_huge_pictures_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 10_000)).save(huge)
    with pytest.raises(DataError, match=r"huge\.png is too large: pictures of up to 179 million pixels"):
        images.read_picture(huge)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match="pictures of up to 0 MB are read"):
        images.read_picture(huge)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_damaged_files_end_in_a_sentence_or_a_picture(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"p.{suffix}")
    whole = (tmp_path / f"p.{suffix}").read_bytes()
    generator = np.random.default_rng(1)
    with pytest.raises(DataError, match="cannot be read as a picture"):
        images.decode_picture(whole[: len(whole) // 3], "p")
    for _ in range(60):
        spoilt = bytearray(whole)
        for at in generator.integers(0, min(len(whole), 200), 4):
            spoilt[at] = generator.integers(0, 256)
        with contextlib.suppress(DataError):
            images.decode_picture(bytes(spoilt), "p")


def test_a_picture_that_is_cut_to_a_size_keeps_its_middle() -> None:
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    assert images.cover(image, (10, 10)).getcolors() == [(100, (255, 0, 0))]
    assert images.cover(image, (30, 10)) is image
    assert images.cover(image, (60, 40)).size == (60, 40)
