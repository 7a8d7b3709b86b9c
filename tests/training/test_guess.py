"""The guess of Stage C: what teaches it, noisy words while it learns, and the prototypes samples name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from test_objectives import FROZEN
from tiny_cascade import write_tiny_cascade
from torch import Tensor, nn

from triptych.checkpoints.catalog import package_folder
from triptych.checkpoints.load import load_part
from triptych.conditioning.encode import load_text_encoder
from triptych.data.shards import ShardIndex
from triptych.errors import DataError
from triptych.images import to_pixels
from triptych.training.config import RunSettings, check_settings
from triptych.training.guess import UNNAMED, BlurredWords, encode_prototypes, guess_loss, known_rows
from triptych.training.loop import train

COLOURS = ("red", "green", "blue")
SIDE = 256  # of what the guess is about: 8 latents of 32 pixels


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three discs and, of each, an outline that names the disc as its prototype."""
    root = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        for name, fill in ((colour, colour), (f"{colour}_outline", "white")):
            image = Image.new("RGB", (SIDE, SIDE), "white")
            ImageDraw.Draw(image).ellipse((40, 40, 216, 216), fill=fill, outline=colour, width=8)
            image.save(root / f"{name}.png")
            (root / f"{name}.txt").write_text(f"{colour} disc{', outline' if fill == 'white' else ''}")
            if fill == "white":
                (root / f"{name}.json").write_text(json.dumps({"prototype": colour}))
    return root


def settings(model: Path, out: Path, steps: int, **data: object) -> RunSettings:
    return check_settings(
        {
            "recipe": "stage_c", "out": str(out), "steps": steps, "batch": 4, "tensorboard": False,
            "log_every": 1, "sample_every": 1000, "network": {"dropout": [0.0, 0.0], "guess": 32},
            "optim": {"lr": 3e-3, "warmup": 1}, "ema": {"enabled": False}, "diffusion": {"drop_text": 0.0},
            "parts": {part: str(model / f"{part}.safetensors") for part in FROZEN},
            "data": {"size": 64, "random_crop": False, "ratios": [1.0], **data},
        }, "test",
    )  # fmt: skip


def logged(out: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_guess_learns_from_its_own_error(model: Path, tmp_path: Path) -> None:
    def guessed(name: str, weight: float) -> list[float]:
        given = settings(model, tmp_path / name, 40, shapes=8).model_dump()
        given["diffusion"] |= {"guess": weight}
        train(check_settings(given, "test"))
        return logged(tmp_path / name, "stage_c.guess")

    learning, left = guessed("learning", 1.0), guessed("left", 0.0)
    assert sum(learning[-5:]) < 0.8 * sum(learning[:5])
    assert sum(left[-5:]) > 0.9 * sum(left[:5])  # the blocks alone ask little of it


def test_a_guess_hears_noisy_words_while_it_learns_and_plain_ones_otherwise() -> None:
    words, noisy = torch.randn(64, 1, 384), nn.Identity()
    BlurredWords(noisy, 0.5, 0.0)
    assert torch.equal(noisy.eval()(words), words)
    off = (noisy.train()(words) - words).std(-1) / words.std(-1)
    assert float(off.min()) > 0
    assert float(off.max()) < 0.6  # half of the words' deviation at most, give or take what 384 draws miss
    assert float(off.mean()) == pytest.approx(0.5 / 3, abs=0.05)  # the mean of a square of a uniform draw


def test_a_guess_hears_other_words_as_far_as_captions_of_other_pictures_differ() -> None:
    words, guess = torch.randn(64, 1, 384), nn.Identity()
    along = torch.zeros(64, 1, 384)
    along[:5, 0, 7] = 2.0  # five pictures have a second caption, which differs in one direction
    blur = BlurredWords(guess.train(), 0.0, 0.7)
    assert torch.equal(guess(words), words)  # no batch was heard yet
    blur.hear(words, words - along, None)
    moved = guess(words) - words
    assert float(moved[..., 7].min()) > 0
    assert float(moved[..., 7].max()) <= 0.7 * 2.0
    assert moved[..., :7].count_nonzero() == moved[..., 8:].count_nonzero() == 0
    blur.hear(words, words, None)  # one caption each: nothing to learn from
    assert torch.equal(guess(words), words)


def test_words_of_pictures_without_a_prototype_stay_as_they_are_where_others_have_one() -> None:
    words, guess = torch.randn(3, 1, 384), nn.Identity()
    prototype = torch.zeros(3, 16, 8, 8)
    prototype[1] = UNNAMED
    blur = BlurredWords(guess.train(), 0.5, 0.7)
    blur.hear(words, words + 1, prototype)
    same = (guess(words) == words).flatten(1).all(1)
    assert same.tolist() == [False, True, False]


def test_the_loss_is_the_distance_to_the_prototype_where_one_is_named() -> None:
    guessed, own, prototype = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 6, 12), torch.randn(3, 16, 8, 8)
    prototype[1] = UNNAMED
    alone = [guess_loss(guessed[k : k + 1], own[k : k + 1], None) for k in range(3)]
    named = [(guessed[k] - prototype[k]).square().mean() for k in range(3)]
    wanted = torch.stack([named[0], alone[1], named[2]]).mean()
    torch.testing.assert_close(guess_loss(guessed, own, prototype), wanted)


def test_prototypes_are_the_latents_of_the_picture_that_is_named(model: Path, pictures: Path) -> None:
    index = ShardIndex(pictures)
    semantic = load_part(model / "semantic.safetensors", "semantic")[0].eval()
    named = [index.prototype(number) for number in range(len(index))]
    latents = encode_prototypes(semantic, named, torch.device("cpu"))
    for number, picture in enumerate(named):
        key = index.key(number)
        assert (picture is None) == (not key.endswith("_outline"))
        if picture is None:
            assert latents[number].isnan().all()
            continue
        assert picture.tobytes() == Image.open(pictures / f"{key.removesuffix('_outline')}.png").tobytes()
        with torch.no_grad():
            torch.testing.assert_close(latents[number], semantic(to_pixels([picture]))[0])


def test_a_prototype_that_is_not_there_is_named_in_the_error(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((pictures / "red.png").read_bytes())
    (tmp_path / "a.json").write_text('{"prototype": "gone"}')
    with pytest.raises(DataError, match="a names the prototype 'gone', which is not there"):
        ShardIndex(tmp_path).prototype(0)


def test_a_run_from_a_cache_learns_the_same_prototypes(model: Path, pictures: Path, tmp_path: Path) -> None:
    data = {"shards": [str(pictures)], "shapes": 4, "prototypes": True}
    train(settings(model, tmp_path / "live", 3, **data))
    train(settings(model, tmp_path / "cached", 3, **data, cache=str(tmp_path / "cache")))
    train(settings(model, tmp_path / "own", 3, **data | {"prototypes": False}))
    unasked = data | {"prototypes": False, "cache": str(tmp_path / "cache")}
    train(settings(model, tmp_path / "unasked", 3, **unasked))  # from a cache that holds them all the same
    live, cached, own, left = (
        logged(tmp_path / name, "stage_c.guess") for name in ("live", "cached", "own", "unasked")
    )
    assert live == pytest.approx(cached, rel=1e-2)  # a cache rounds latents to float16
    assert live != pytest.approx(own, rel=1e-2)
    assert own == pytest.approx(left, rel=1e-2)


def test_a_run_from_a_cache_hears_the_same_other_words(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Tensor] = []

    def hear(self: BlurredWords, text: Tensor, other: Tensor | None, prototype: Tensor | None) -> None:
        assert other is not None
        assert prototype is not None
        assert not known_rows(prototype).any()  # shapes name none, so their words stay as they are
        heard.append(text - other)

    monkeypatch.setattr(BlurredWords, "hear", hear)
    for data in ({}, {"cache": str(tmp_path / "cache")}):
        given = settings(
            model, tmp_path / f"run{len(heard)}", 3, shapes=8, prototypes=True, **data
        ).model_dump()
        given["diffusion"] |= {"guess_rewording": 0.7, "drop_text": 0.3}
        train(check_settings(given, "test"))
    live, cached = torch.cat(heard[:3]), torch.cat(heard[3:])
    torch.testing.assert_close(live, cached, rtol=0, atol=0.02)  # a cache rounds words to float16
    assert live.abs().amax(-1).max() > 0.1


def test_a_guess_gives_the_prototype_whatever_style_is_asked_for(pictures: Path, tmp_path: Path) -> None:
    mini = package_folder("mini")  # an encoder that tells discs from outlines
    train(
        settings(mini, tmp_path, 100, shards=[str(pictures)], prototypes=True, cache=str(tmp_path / "cache"))
    )
    network: Any = load_part(tmp_path / "stage_c.safetensors", "stage_c")[0].eval()
    _, words = load_text_encoder(mini / "text_encoder.safetensors").encode(
        [f"{colour} disc, outline" for colour in COLOURS]
    )
    with torch.no_grad():
        guessed = network.guess(words.float())
    far = [float((guessed - latents_of(pictures, end)).square().mean()) for end in ("", "_outline")]
    assert far[0] < 0.3 * far[1]


def latents_of(pictures: Path, end: str) -> Tensor:
    semantic = load_part(package_folder("mini") / "semantic.safetensors", "semantic", dtype=torch.float32)[0]
    shown = [Image.open(pictures / f"{colour}{end}.png").convert("RGB") for colour in COLOURS]
    with torch.no_grad():
        latents: Tensor = semantic.eval()(to_pixels(shown))
    return latents
