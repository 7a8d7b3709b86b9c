"""Pictures in: variations, image to image, latents; what a request remembers of them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_folders import write_official
from safetensors import safe_open

from triptych import Cascade, CheckpointError, DataError, Request, RequestError
from triptych.conditioning.encode import load_image_encoder
from triptych.data.shapes import draw_shapes
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.schedule import Schedule
from triptych.images import cover, to_pixels
from triptych.pipelines.inputs import Inputs
from triptych.pipelines.latents import Latents
from triptych.pipelines.noise import START, draw


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path) -> Cascade:
    return Cascade.load(tiny_cascade, dtype="float32")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    draw_shapes(3, 64, 64).image.save(path)
    return path


@pytest.fixture(scope="module")
def other(photo: Path) -> Path:
    draw_shapes(8, 64, 64).image.save(photo.with_name("other.png"))
    return photo.with_name("other.png")


def test_a_variation_follows_its_picture_and_its_prompt(cascade: Cascade, photo: Path, other: Path) -> None:
    plain = cascade.generate("a red apple", seed=1).latents_c
    varied = cascade.vary(photo, "a red apple", seed=1).latents_c
    assert not torch.equal(plain, varied)
    assert not torch.equal(varied, cascade.vary(other, "a red apple", seed=1).latents_c)
    assert not torch.equal(varied, cascade.vary(photo, seed=1).latents_c)
    assert not torch.equal(varied, cascade.vary(photo, "a red apple", seed=2).latents_c)


def test_a_weight_of_zero_leaves_the_picture_out(cascade: Cascade, photo: Path, other: Path) -> None:
    plain = cascade.generate("a red apple", seed=1).latents_c
    without = cascade.vary(photo, "a red apple", weight=0, references=[(other, 0)], seed=1).latents_c
    assert torch.equal(plain, without)
    halves = [cascade.vary(photo, "a red apple", weight=w, seed=1).latents_c for w in (0.25, 0.5, 1)]
    distances = [float((half - plain).norm()) for half in halves]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_what_stage_c_is_told_of_pictures(
    cascade: Cascade, tiny_cascade: Path, photo: Path, other: Path
) -> None:
    told: list[torch.Tensor] = []
    with cascade.parts.turn("stage_c") as network:
        handle = network.register_forward_pre_hook(lambda module, inputs: told.append(inputs[4]))
    cascade.vary(photo, references=[(other, 0.5)], seed=1, steps=1)
    handle.remove()
    tower = load_image_encoder(tiny_cascade / "image_encoder.safetensors")
    first, second = (tower.encode(to_pixels([Image.open(path)])) for path in (photo, other))
    expected = torch.stack([first[0], 0.5 * second[0]])  # one token group a picture, weights scale
    torch.testing.assert_close(told[0][0], expected)
    assert not told[0][1].any()  # guidance is measured against no picture


def test_without_a_prompt_the_pooled_text_may_come_from_the_picture(cascade: Cascade, photo: Path) -> None:
    settings = cascade.parts.info("stage_c").settings
    told: list[torch.Tensor] = []
    with cascade.parts.turn("stage_c") as network:
        handle = network.register_forward_pre_hook(lambda module, inputs: told.append(inputs[3:5]))
    try:
        settings["pooled_from_image"] = True
        cascade.vary(photo, seed=1, steps=1)
        cascade.vary(photo, "a red apple", seed=1, steps=1)
        cascade.generate("a red apple", seed=1, steps=1)
    finally:
        del settings["pooled_from_image"]
        handle.remove()
    (silent, embed), (worded, _), (plain, _) = told
    torch.testing.assert_close(silent[0], embed[0])  # the tower's vectors have length 1
    torch.testing.assert_close(worded, plain)


def test_a_picture_may_come_from_memory(cascade: Cascade, photo: Path) -> None:
    from_file = cascade.vary(photo, seed=1)
    with Image.open(photo) as image:
        from_memory = cascade.vary(image.convert("RGB"), seed=1)
    assert torch.equal(from_file.latents_b, from_memory.latents_b)
    with pytest.raises(RequestError, match="was in no file; pass it again"):
        cascade.generate(from_memory.request)


def test_strength_0_is_the_reconstruction_and_1_plain_generation(cascade: Cascade, photo: Path) -> None:
    def changed(strength: float) -> torch.Tensor:
        return cascade.img2img(photo, "a red apple", strength=strength, seed=5).latents_b

    latents = cascade.encode(photo)
    assert torch.equal(changed(0), cascade.reconstruct(photo, "a red apple", seed=5).latents_b)
    assert torch.equal(changed(0), cascade.decode(latents, "a red apple", seed=5).latents_b)
    assert torch.equal(changed(1), cascade.generate("a red apple", seed=5, size="64x64").latents_b)


def test_a_start_is_noised_with_the_shift_of_the_sampling(cascade: Cascade, photo: Path) -> None:
    seen: list[torch.Tensor] = []
    with cascade.parts.turn("stage_c") as network:
        handle = network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    cascade.img2img(photo, strength=0.5, seed=5, steps=4)
    handle.remove()
    assert len(seen) == 2  # half of the steps
    start = cascade.encode(photo).latents_c
    eps = draw(5, "stage_c", START, start.shape[1:])[None]
    level = Schedule(cascade.parts.info("stage_c").settings["shift"]).logsnr(torch.tensor(0.5))
    torch.testing.assert_close(seen[0][:1], add_noise(start, eps, level))


def test_less_strength_stays_nearer_to_the_picture(cascade: Cascade) -> None:
    """With a random network too, at the lower levels: the noise decides how much of the start is left."""
    distances = torch.zeros(4)
    for seed in range(4):
        image = draw_shapes(seed, 64, 64).image
        start = cascade.encode(image).latents_c
        for index, strength in enumerate((0, 0.2, 0.4, 0.6)):
            made = cascade.img2img(image, strength=strength, seed=seed, steps=8, decoder_steps=1).latents_c
            distances[index] += (made - start).norm()
    assert distances[0] == 0
    assert (distances.diff() > 0).all()


@pytest.mark.parametrize(
    ("size", "made"),
    [((64, 64), (64, 64)), ((500, 301), (80, 48)), ((63, 65), (64, 64)), ((9, 4000), (32, 128))],
)
def test_a_picture_of_any_size_gets_one_that_can_be_made(
    cascade: Cascade, size: tuple[int, int], made: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "red")
    result = cascade.img2img(image, seed=1, steps=1, decoder_steps=1)
    assert result.images[0].size == result.request.size == made
    assert cascade.reconstruct(image, size="48x40", decoder_steps=1).images[0].size == (48, 40)


def test_latents_go_through_a_file(cascade: Cascade, photo: Path, tmp_path: Path) -> None:
    path = cascade.encode(photo, stage="b").save(tmp_path / "photo.safetensors")
    latents = Latents.load(path)
    assert (latents.size, latents.model) == ((64, 64), cascade.files.name)
    with safe_open(path, "pt") as file:
        assert file.get_slice("latents_c").get_shape() == [1, 16, 2, 2]
        assert file.get_slice("latents_b").get_shape() == [1, 4, 16, 16]
    with cascade.parts.turn("stage_a") as stage_a, torch.no_grad():
        expected = stage_a.decode(stage_a.encode(to_pixels([Image.open(photo)])))
    (image,) = cascade.decode(path).images
    assert (to_pixels([image]) - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(RequestError, match="is there already"):
        latents.save(path)


def test_latents_of_another_kind_of_model_are_refused(cascade: Cascade, photo: Path) -> None:
    latents = cascade.encode(photo)
    foreign = Latents(latents.latents_c, latents.size, "cascade", 42.67)
    with pytest.raises(RequestError, match=r'made by the model "cascade", with 42.67 pixels a latent'):
        cascade.decode(foreign)
    with pytest.raises(RequestError, match="whose latents_c are 1x2"):
        cascade.generate("a", Inputs(latents_c=latents.latents_c), size="64x32")


def test_files_that_are_no_latents_are_named(tiny_cascade: Path) -> None:
    with pytest.raises(CheckpointError, match="holds previewer; latents were expected"):
        Latents.load(tiny_cascade / "previewer.safetensors")


def test_a_request_names_its_pictures_and_is_made_again_from_them(
    cascade: Cascade, photo: Path, other: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(photo, tmp_path / "copy.png"))
    first = cascade.vary(copy, references=[(other, 0.5)], seed=1)
    stored = first.metadata[0]["request"]["sources"]
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    assert stored[0] == {"role": "reference", "file": str(copy), "sha256": digest, "weight": 1.0}
    assert stored[1]["weight"] == 0.5
    again = cascade.generate(Request(**first.metadata[0]["request"]))
    assert torch.equal(first.latents_b, again.latents_b)
    copy.write_bytes(other.read_bytes())
    with pytest.raises(RequestError, match="is not the file that was used: its SHA-256 is"):
        cascade.generate(first.request)
    copy.unlink()
    with pytest.raises(
        DataError, match=r"No such picture: .*copy\.png\. It is the reference of this request"
    ):
        cascade.generate(first.request)


def test_mistakes_are_found_before_weights_are_read(tiny_cascade: Path, photo: Path, tmp_path: Path) -> None:
    cascade = Cascade.load(tiny_cascade)
    with pytest.raises(RequestError, match="from 0 to 100, not -1"):
        cascade.vary(photo, weight=-1)
    with pytest.raises(RequestError, match="strength"):
        cascade.img2img(photo, strength=1.5)
    with pytest.raises(RequestError, match="no picture to start from"):
        cascade.generate("a", strength=0.5)
    with pytest.raises(DataError, match="No such picture"):
        cascade.vary(tmp_path / "none.png")
    with pytest.raises(RequestError, match='not of "a"'):
        cascade.encode(photo, stage="a")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"sources\.0\.sha256 = '0'"):
        Request(prompt="a", sources=({"role": "start", "sha256": "0"},))
    assert not cascade.parts._loaded


@pytest.mark.parametrize(
    ("part", "says"), [("image_encoder", "image encoder"), ("semantic", "semantic encoder")]
)
def test_a_model_without_the_encoder_says_so(
    tiny_cascade: Path, photo: Path, tmp_path: Path, part: str, says: str
) -> None:
    poor = Path(shutil.copytree(tiny_cascade, tmp_path / "poor"))
    (poor / f"{part}.safetensors").unlink()
    cascade = Cascade.load(poor)
    with pytest.raises(CheckpointError, match=f"has no {says}, which this needs"):
        (cascade.vary if part == "image_encoder" else cascade.img2img)(photo)


def test_the_published_layout_varies_and_changes_pictures(tmp_path: Path, photo: Path) -> None:
    cascade = Cascade.load(write_official(tmp_path / "official", semantic=True), dtype="float32")
    small = {"size": "128x192", "steps": 2, "decoder_steps": 2, "seed": 5}
    plain, told = cascade.generate("", **small), cascade.vary(photo, **small)
    assert not torch.equal(plain.latents_c, told.latents_c)
    kept = cascade.reconstruct(photo, **small)
    with Image.open(photo) as image, cascade.parts.turn("semantic") as encoder, torch.no_grad():
        # 42.67 pixels a latent: the encoder sees the picture at 3/4, in whole latents.
        pixels = torch.nn.functional.interpolate(
            to_pixels([cover(image.convert("RGB"), (128, 192))]), (160, 96), mode="bilinear", antialias=True
        )
        assert torch.allclose(kept.latents_c, encoder(pixels), atol=1e-5)
    changed = cascade.img2img(photo, "a", strength=1, **small)
    assert torch.equal(changed.latents_b, cascade.generate("a", **small).latents_b)
    assert np.asarray(kept.images[0]).shape == (192, 128, 3)
