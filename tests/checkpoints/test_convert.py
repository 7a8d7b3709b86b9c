"""Models between layouts: nothing lost in any direction, and diffusers' own classes accept what we write."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from published_folders import diffusers, networks, write_comfyui, write_diffusers, write_official
from safetensors.torch import load_file

from triptych.checkpoints.catalog import find_model
from triptych.checkpoints.convert import TARGETS, convert_file, convert_model, read_tower
from triptych.checkpoints.load import load_part
from triptych.conditioning.encode import condition, load_text_encoder
from triptych.diffusion.denoiser import Denoiser, Guidance
from triptych.diffusion.samplers import sample_ddpm
from triptych.diffusion.schedule import Schedule
from triptych.errors import CheckpointError

PARTS = ("stage_a", "stage_b", "stage_c", "previewer")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {
        "official": write_official(root / "official"),
        "diffusers": write_diffusers(root / "diffusers"),
        "comfyui": write_comfyui(root / "comfyui"),
    }


def assert_same_weights(folder: Path, skip: tuple[str, ...] = ()) -> None:
    files = find_model(folder)
    for part, network in networks().items():
        if part in skip:
            continue
        module, _ = load_part(getattr(files, part), part)
        assert module.config == network.config
        for name, tensor in network.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_whole_models_keep_every_number(tmp_path, sources, source, target):
    skip = ("previewer",) if source == "diffusers" else ()  # diffusers has no previewer
    convert_model(find_model(sources[source]), tmp_path / "there", target)
    assert_same_weights(tmp_path / "there", skip)
    convert_model(find_model(tmp_path / "there"), tmp_path / "back", source)
    assert_same_weights(tmp_path / "back", skip)
    for part in ("text_encoder", "image_encoder"):
        before, config = read_tower(getattr(find_model(sources[source]), part), part)
        after, again = read_tower(getattr(find_model(tmp_path / "back"), part), part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert config["hidden_size"] == again["hidden_size"]


def test_diffusers_loads_what_we_write_strictly(tmp_path, sources):
    from diffusers import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    convert_model(find_model(sources["official"]), tmp_path / "out", "diffusers")
    made = networks()
    for kind, place in (
        (StableCascadeUNet, "stable-cascade/decoder"),
        (StableCascadeUNet, "stable-cascade-prior/prior"),
        (PaellaVQModel, "stable-cascade/vqgan"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = kind.from_pretrained(tmp_path / "out" / place, output_loading_info=True)
        assert not any(report.values()), report
    assert model.config.scale_factor == 0.43
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = model.encode(pixels).latents / model.config.scale_factor
        torch.testing.assert_close(latents, made["stage_a"].encode(pixels), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, sources) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_model(find_model(sources["official"]), folder, "diffusers")
    return folder


@pytest.mark.parametrize(
    ("name", "root", "parts"),
    [
        ("StableCascadeDecoderPipeline", "stable-cascade", {"decoder": "stage_b", "vqgan": "stage_a"}),
        ("StableCascadePriorPipeline", "stable-cascade-prior", {"prior": "stage_c"}),
    ],
)
def test_the_pipelines_of_diffusers_load_our_folders_whole(converted, name, root, parts):
    pipe = getattr(__import__("diffusers"), name).from_pretrained(converted / root)
    assert all(component is not None for component in pipe.components.values())
    made = networks()
    for component, part in parts.items():
        expected = diffusers(part, made[part].state_dict())
        state = getattr(pipe, component).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state), component


@torch.no_grad()
def test_the_decoder_of_diffusers_makes_the_same_latents_and_pixels(converted):
    from diffusers import StableCascadeDecoderPipeline

    steps, weight = 3, 1.1
    generator = torch.Generator().manual_seed(3)
    latents_c = torch.randn(1, 16, 4, 6, generator=generator)
    start = torch.randn(1, 4, 42, 64, generator=generator)
    theirs = StableCascadeDecoderPipeline.from_pretrained(converted / "stable-cascade")
    theirs.set_progress_bar_config(disable=True)
    want = theirs(
        latents_c,
        prompt="a red apple",
        num_inference_steps=steps,
        guidance_scale=weight,
        latents=start.clone(),
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images

    files = find_model(converted)
    stage_b, stage_a = load_part(files.stage_b)[0], load_part(files.stage_a)[0]
    read = condition(load_text_encoder(files.text_encoder, files.tokenizer), ["a red apple", ""])
    semantic = torch.cat([latents_c, torch.zeros_like(latents_c)])
    schedule = Schedule()
    times, logsnrs = schedule.grid(steps)
    told = iter(times)  # diffusers tells the network the time of its grid, also where noise is clamped

    def predict(x, t, branches):
        return stage_b(torch.cat([x, x]), next(told).expand(2), semantic, read.text_pooled).chunk(2)

    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(start.shape, generator=generator) for _ in range(steps)]
    draws[-1] = torch.zeros(start.shape)  # diffusers adds none in its last step
    denoise = Denoiser(predict, schedule, "eps", Guidance(weight, rescale=0.0))
    *_, last = sample_ddpm(denoise, start, times, logsnrs, draws.__getitem__)
    # A random network is no denoiser: its latents are large.
    assert float((last.x - want).abs().max()) < 1e-4 * float(want.abs().max())
    small = want / want.abs().max()
    pixels = theirs.vqgan.decode(theirs.vqgan.config.scale_factor * small).sample
    torch.testing.assert_close(stage_a.decode(small), pixels, rtol=1e-4, atol=1e-5)


def test_our_configuration_files_equal_those_of_diffusers(tmp_path, sources):
    from diffusers import StableCascadeUNet

    convert_model(find_model(sources["diffusers"]), tmp_path / "out", "diffusers")
    for place in ("stable-cascade/decoder", "stable-cascade-prior/prior"):
        theirs = StableCascadeUNet.load_config(sources["diffusers"] / place)
        ours = StableCascadeUNet.load_config(tmp_path / "out" / place)
        ignored = {"_diffusers_version", "_name_or_path", "_use_default_values"}
        for name in (theirs.keys() | ours.keys()) - ignored:
            assert _plain(ours.get(name)) == _plain(theirs.get(name)), name


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def test_single_files(tmp_path, sources):
    source = sources["official"] / "stage_c.safetensors"
    folder = tmp_path / "prior"
    assert {path.name for path in convert_file(source, folder, "diffusers")} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    back = tmp_path / "back.safetensors"
    convert_file(folder / "diffusion_pytorch_model.safetensors", back, "official")
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    narrow = tmp_path / "narrow.safetensors"
    convert_file(source, narrow, "official", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(narrow).values()} == {torch.bfloat16}
    single = tmp_path / "comfy.safetensors"
    convert_file(source, single, "comfyui")
    assert all(name.startswith("model.diffusion_model.") for name in load_file(single))


def test_what_cannot_be_converted_is_said_and_leaves_nothing(tmp_path, sources):
    official, comfyui = sources["official"], sources["comfyui"]
    for source, target, layout, message in (
        (official / "previewer.safetensors", tmp_path / "a", "diffusers", "no form of previewer"),
        (official / "stage_c.safetensors", tmp_path / "b.safetensors", "diffusers", "is a folder"),
        (comfyui / "stable_cascade_stage_c.safetensors", tmp_path / "c.safetensors", "official", "separate"),
        (official / "text_encoder" / "model.safetensors", tmp_path / "d", "official", "text_encoder"),
        (official / "stage_c.safetensors", tmp_path / "e", "gguf", "Known: official, diffusers, comfyui"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_file(source, target, layout)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_never_written_over(tmp_path, sources):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert_model(find_model(sources["official"]), tmp_path, "official")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
