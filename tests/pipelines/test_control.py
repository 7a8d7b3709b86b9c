"""Controls steer Stage C as asked for, and pixels outside a mask are never touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from controlnets import config_for, controlled_cascade, write_controlnet
from PIL import Image, ImageDraw

from triptych import Cascade, Request
from triptych.errors import CheckpointError, RequestError
from triptych.images import to_pixels
from triptych.pipelines.control import Steering
from triptych.pipelines.inputs import Control, Inputs
from triptych.pipelines.pictures import encode_semantic
from triptych.pipelines.request import ControlRequest

QUICK = {"seed": 3, "steps": 4, "decoder_steps": 1}


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    folder = controlled_cascade(tiny_cascade, tmp_path_factory.mktemp("controlled"))
    return Cascade.load(folder, device="cpu", dtype="float32")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((14, 14, 50, 50), fill="red", outline="black", width=3)
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def latents(cascade: Cascade, *controls: Steering, **settings) -> torch.Tensor:
    return cascade.steer("a star", *controls, **{**QUICK, **settings}).latents_c


def canny(photo: Path, **settings) -> Steering:
    return Steering("canny", photo, settings=settings)


def test_a_control_changes_the_picture_and_none_of_its_weight_does_not(cascade, photo):
    plain = cascade.generate("a star", **QUICK).latents_c
    assert torch.equal(latents(cascade, canny(photo, weight=0.0)), plain)
    assert not torch.allclose(latents(cascade, canny(photo)), plain, atol=1e-3)


def test_a_control_acts_between_its_fractions_of_the_sampling(cascade, photo):
    first, last = (latents(cascade, canny(photo, **part)) for part in ({"end": 0.5}, {"begin": 0.5}))
    whole = latents(cascade, canny(photo))
    assert not torch.allclose(first, whole, atol=1e-4)
    assert not torch.allclose(last, whole, atol=1e-4)
    assert not torch.allclose(first, last, atol=1e-4)
    halves = latents(cascade, canny(photo, end=0.5), canny(photo, begin=0.5))
    torch.testing.assert_close(halves, whole)
    with pytest.raises(RequestError, match="never acts"):
        ControlRequest(hint="canny", picture=0, begin=0.5, end=0.5)


def test_several_controls_add_up_in_any_order(cascade, photo):
    one, other = canny(photo, weight=0.5), Steering("palette", photo, settings={"weight": 0.7})
    both = latents(cascade, one, other)
    torch.testing.assert_close(both, latents(cascade, other, one))
    assert not torch.allclose(both, latents(cascade, one), atol=1e-4)
    torch.testing.assert_close(latents(cascade, one, one), latents(cascade, canny(photo)))
    small = Steering("super_resolution", photo, settings={"weight": 0.5})  # another map size
    assert torch.isfinite(latents(cascade, one, small)).all()


def test_both_halves_of_guidance_see_the_residuals(cascade):
    """With the prompt as negative, both halves answer alike, so guidance changes nothing."""
    residuals = [None, torch.randn(1, 32, 2, 2)]
    inputs = Inputs(controls=(Control(residuals),))
    settings = {**QUICK, "negative": "a star"}
    guided = cascade.generate("a star", inputs, guidance=4.0, **settings).latents_c
    plain = cascade.generate("a star", inputs, guidance=1.0, **settings).latents_c
    torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-4)


def test_pixels_outside_the_hole_are_exactly_the_pictures(cascade, tmp_path):
    """Whatever the size of the picture, in one the model could not make."""
    noise = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    result = cascade.inpaint(picture, "a star", box=(20, 30, 40, 25), count=2, **QUICK)
    for image in result.images:
        made = np.asarray(image)
        assert made.shape == noise.shape
        outside = np.ones((75, 101), dtype=bool)
        outside[30:55, 20:60] = False
        assert np.array_equal(made[outside], noise[outside])
        assert (made[35:50, 25:55] != noise[35:50, 25:55]).mean() > 0.9
    mask = Image.new("L", (101, 75))
    mask.paste(255, (20, 30, 60, 55))
    again = cascade.inpaint(picture, "a star", mask=mask, count=2, **QUICK)
    assert np.array_equal(np.asarray(again.images[1]), np.asarray(result.images[1]))


def test_latents_outside_the_hole_can_be_held(cascade, photo):
    """Whatever the sampler they end as those of the picture with the mean colour in its hole."""
    box = (0, 0, 20, 64)  # the left column of latents
    pixels = to_pixels([Image.open(photo).convert("RGB")])
    pixels[..., :20] = pixels[..., 20:].mean((2, 3), keepdim=True)
    true = encode_semantic(cascade.parts, pixels)
    assert true.shape[-2:] == (2, 2)
    for sampler in ("ddpm", "euler", "dpmpp_2m"):
        asked = {**QUICK, "box": box, "sampler": sampler}
        held = cascade.inpaint(photo, "a star", control={"hold": True}, **asked).latents_c
        free = cascade.inpaint(photo, "a star", **asked).latents_c
        torch.testing.assert_close(held[..., 1], true[..., 1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(free[..., 1], true[..., 1], atol=0.1)
        assert not torch.allclose(held[..., 0], true[..., 0], atol=0.1)
        assert not torch.allclose(held[..., 0], free[..., 0], atol=1e-3)  # drawn beside what is held


def test_a_model_may_hold_them_by_itself(cascade, photo):
    settings = cascade.parts.info("stage_c").settings
    asked = {**QUICK, "box": (0, 0, 20, 64)}
    held = cascade.inpaint(photo, "a star", control={"hold": True}, **asked).latents_c
    settings["hold"] = True
    try:
        assert torch.equal(cascade.inpaint(photo, "a star", **asked).latents_c, held)
        free = cascade.inpaint(photo, "a star", control={"hold": False}, **asked).latents_c
        assert not torch.equal(free, held)
    finally:
        del settings["hold"]


def test_what_stands_out_can_be_the_hole(cascade, photo):
    before = np.asarray(Image.open(photo))
    made = np.asarray(cascade.inpaint(photo, "a star", **QUICK).images[0])
    changed = (made != before).any(-1)
    assert changed[32, 32]
    assert not changed[0].any()


def test_outpainting_grows_the_sides_asked_for(cascade, photo):
    before = np.asarray(Image.open(photo))
    (image,) = cascade.outpaint(photo, "a star", left=32, bottom=16, **QUICK).images
    assert image.size == (96, 80)
    made = np.asarray(image)
    assert np.array_equal(made[:64, 32:], before)
    with pytest.raises(RequestError, match="Nothing is to be drawn"):
        cascade.outpaint(photo, "a star", **QUICK)


def test_a_picture_comes_back_two_or_four_times_as_large(cascade, photo):
    for factor in (2, 4):
        (image,) = cascade.upscale(photo, factor=factor, **QUICK).images
        assert image.size == (64 * factor, 64 * factor)
    with pytest.raises(RequestError, match="2 or 4 times"):
        cascade.upscale(photo, factor=3)


def test_latents_are_upscaled_without_pixels(cascade):
    plain = cascade.generate("a star", **QUICK)
    loaded = cascade.parts
    for part in ("stage_a", "semantic"):
        loaded.release(part)
    events = list(cascade.stream("a star", upscale=2, **QUICK))
    large = events[-1].result
    assert large.images[0].size == (128, 128)
    assert large.latents_c.shape[-2:] == (4, 4)
    names = [event.stage for event in events]
    assert names.count("stage_c") == 8
    assert names.index("stage_b") > max(i for i, name in enumerate(names) if name == "stage_c")
    assert torch.equal(cascade.generate("a star", upscale=2, **QUICK).latents_c, large.latents_c)
    assert plain.images[0].size == (64, 64)
    with pytest.raises(RequestError, match="no latents from outside"):
        cascade.generate("a star", Inputs(latents_c=plain.latents_c), upscale=2, **QUICK)


def test_a_picture_with_controls_is_made_again_from_its_request(cascade, photo, tmp_path):
    result = cascade.canny(photo, "a star", control={"weight": 0.8, "end": 0.6}, **QUICK)
    stored = Request(**result.metadata[0]["request"])
    assert stored.controls[0].weight == 0.8
    again = cascade.generate(stored)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))
    Image.new("RGB", (64, 64)).save(photo)
    with pytest.raises(RequestError, match="is not the file that was used"):
        cascade.generate(stored)


def test_hints_can_be_looked_at(cascade, photo):
    for hint in ("canny", "palette", "super_resolution", "pixel_super_resolution"):
        request = Request(
            prompt="", sources=[source(photo)], controls=[{"hint": hint, "picture": 0}], size=(64, 64)
        )
        (shown,) = cascade.hints(request)
        assert shown.mode == "RGB"
        assert len(shown.getcolors(maxcolors=1 << 16)) > 1


def source(photo: Path):
    from triptych.pipelines.pictures import bring

    return bring(photo, "control").source


@pytest.mark.parametrize(
    ("control", "error", "said"),
    [
        ({"hint": "cany"}, RequestError, 'no control "cany": did you mean "canny"'),
        ({"hint": "identity"}, RequestError, "needs a face recogniser"),
        ({"hint": "qr"}, CheckpointError, r'has no ControlNet for "qr"; it has canny, identity'),
        ({"hint": "soft_edges", "controlnet": "canny"}, CheckpointError, "need the edge network PiDiNet"),
        ({"hint": "inpainting", "controlnet": "canny"}, CheckpointError, "takes hints of 1 channels"),
        ({"hint": "canny", "controlnet": "absent"}, CheckpointError, "no ControlNet at"),
        ({"hint": "canny", "controlnet": "wide"}, CheckpointError, 'made for the Stage C "3.6b"'),
        ({"hint": "canny", "controlnet": "deep"}, CheckpointError, "adds to block 63 .* has 4 blocks"),
        ({"hint": "inpainting"}, RequestError, "Nothing is to be drawn"),
        ({"hint": "canny", "weight": -1}, RequestError, "weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_has_its_sentence(cascade, photo, tmp_path, control, error, said):
    files = {
        "canny": lambda path: write_controlnet(path),
        "wide": lambda path: write_controlnet(path, config=config_for("canny", width=2048)),
        "deep": lambda path: write_controlnet(path, config=deep()),
    }
    if "controlnet" in control:
        path = tmp_path / f"{control['controlnet']}.safetensors"
        files.get(control["controlnet"], lambda path: None)(path)
        control = control | {"controlnet": str(path)}
    settings = {name: value for name, value in control.items() if name != "hint"}
    with pytest.raises(error, match=said):
        latents(cascade, Steering(control["hint"], photo, settings=settings))


def deep():
    from dataclasses import replace

    return replace(config_for("canny"), blocks=(0, 63))


def test_a_model_may_be_guided_less_where_a_picture_says_what_to_draw(cascade, photo):
    settings = cascade.parts.info("stage_c").settings
    usual = settings["guidance"]
    settings["guidance_with_picture"] = usual - 0.5
    try:
        assert cascade.steer("a star", canny(photo), **QUICK).request.guidance == usual - 0.5
        assert cascade.vary(photo, **QUICK).request.guidance == usual - 0.5
        assert cascade.steer("a star", canny(photo), **QUICK, guidance=1.0).request.guidance == 1.0
        assert cascade.generate("a star", **QUICK).request.guidance == usual
        assert cascade.img2img(photo, "a star", **QUICK).request.guidance == usual
    finally:
        del settings["guidance_with_picture"]
