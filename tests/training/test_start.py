"""Fine-tuning: every part begins with weights in the published layout, and what it writes says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_folders import write_official
from safetensors.torch import load_file, save_file

from triptych.checkpoints.files import PartInfo, read_tensors, write_part
from triptych.checkpoints.load import config_fields, load_part, read_part
from triptych.errors import SettingsError
from triptych.models.stage_a import STAGE_A, StageA
from triptych.pipelines.placement import blocks_of
from triptych.training.config import RunSettings, check_settings
from triptych.training.encoders import load_encoders
from triptych.training.loop import train
from triptych.training.start import following_init, network_config

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cascade as the hub has it, the semantic encoder at its published size."""
    return write_official(tmp_path_factory.mktemp("published"), semantic=True)


def settings(recipe: str, model: Path, out: Path, **changes: object) -> RunSettings:
    raw: dict[str, object] = {
        "recipe": recipe, "init": str(model), "out": str(out), "steps": 2, "batch": 2, "tensorboard": False,
        "sample_every": 2, "ema": {"every": 1, "beta": 0.5, "start": 0},
        "data": {"shards": [str(FIXTURE)], "size": 64, "share_alike": True},
        "diffusion": {"sampling": {"steps": 2}}, "optim": {"lr": 1e-3, "warmup": 1}, **changes,
    }  # fmt: skip
    return check_settings(raw, "test")


@pytest.mark.parametrize("recipe", ["stage_a", "stage_b", "stage_c"])
def test_a_published_part_is_trained_further(recipe: str, model: Path, tmp_path: Path) -> None:
    train(settings(recipe, model, tmp_path))
    before, after = read_part(model / f"{recipe}.safetensors"), read_part(tmp_path / f"{recipe}.safetensors")
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    assert any(not torch.equal(after.tensors[n].float(), t.float()) for n, t in before.tensors.items())
    load_part(tmp_path / f"{recipe}.safetensors", recipe)
    assert (tmp_path / "samples" / "0000002.png").exists()


def test_the_published_encoder_and_previewer_are_trained_further(model: Path, tmp_path: Path) -> None:
    train(settings("semantic", model, tmp_path, steps=1, batch=1, sample_every=100))
    for part in ("semantic", "previewer"):
        load_part(tmp_path / f"{part}.safetensors", part)


def test_a_decoder_taught_alone_leaves_the_latents_as_they_were(model: Path, tmp_path: Path) -> None:
    alone = {"decoder_only": True, "restart_codes": 1, "quantised": 0.5}
    train(settings("stage_a", model, tmp_path, autoencoder=alone, optim={"lr": 1e-2, "warmup": 1}))
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    before, after = (load_part(folder / "stage_a.safetensors", "stage_a")[0] for folder in (model, tmp_path))
    latents = before.encode(pixels)
    assert torch.equal(after.encode(pixels), latents)
    assert not torch.allclose(after.decode(latents), before.decode(latents), atol=1e-3)
    with pytest.raises(SettingsError, match="init"):
        train(settings("stage_a", model, tmp_path / "new", autoencoder=alone, init=None))


def test_the_scale_of_latents_is_that_of_the_first_weights_also_where_a_size_is_named(
    model: Path, tmp_path: Path
) -> None:
    config = replace(STAGE_A["mini"], scale=0.9)
    file = tmp_path / "stage_a.safetensors"
    write_part(file, StageA(config).state_dict(), PartInfo("stage_a", config=config_fields(config)))
    named = settings("stage_a", model, tmp_path, init=str(file), size="mini")
    assert network_config(named, "stage_a", STAGE_A) == config
    told = settings("stage_a", model, tmp_path, init=str(file), size="mini", network={"scale": 0.5})
    assert network_config(told, "stage_a", STAGE_A).scale == 0.5


def test_towers_left_in_their_files_teach_the_same(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    parts = {"text_encoder": str(folder), "image_encoder": str(model / "image_encoder")}
    for name, offload in (("held", False), ("left", True)):
        train(settings("stage_c", model, tmp_path / name, parts=parts | {"offload": offload}))
    held, left = (read_tensors(tmp_path / name / "state.safetensors") for name in ("held", "left"))
    assert all(tensor.equal(held[name]) for name, tensor in left.items())

    own = following_init(settings("stage_c", model, tmp_path, parts=parts | {"offload": True}))
    text = load_encoders(own.parts, ["text_encoder"], torch.device("cpu")).text
    assert text is not None
    text.encode(["a red apple"])
    layers = [p for block in blocks_of(text.tower) for p in block.parameters()]  # type: ignore[arg-type]
    assert {p.dtype for p in layers} == {torch.bfloat16}  # wide only while they ran


def test_what_the_files_say_is_followed_where_the_settings_do_not(model: Path, tmp_path: Path) -> None:
    own = following_init(settings("stage_c", model, tmp_path))
    assert own.diffusion.prediction == "eps"
    assert own.diffusion.sampling["pixels_per_latent"] == pytest.approx(42.67)
    assert own.diffusion.sampling["steps"] == 2
    assert own.parts.semantic == str(model / "effnet_encoder.safetensors")
    assert own.parts.text_encoder == str(model / "text_encoder")
    data = {"shards": [str(FIXTURE)]}
    assert following_init(settings("stage_c", model, tmp_path, data=data)).data.size == 768
    asked = settings("stage_c", model, tmp_path, diffusion={"prediction": "v"})
    assert following_init(asked).diffusion.prediction == "v"


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_an_eps_model_learns_to_answer_something_else(prediction: str, model: Path, tmp_path: Path) -> None:
    changes = {"diffusion": {"prediction": prediction, "weight": "min_snr"}, "steps": 1, "sample_every": 100}
    train(settings("stage_c", model, tmp_path, **changes))
    info = read_part(tmp_path / "stage_c.safetensors").info
    assert info.settings["prediction"] == prediction
    assert info.settings["shift"] == read_part(model / "stage_c.safetensors").info.settings["shift"]


def test_the_first_step_is_taken_from_the_weights_as_they_were(model: Path, tmp_path: Path) -> None:
    own = settings("stage_c", model, tmp_path, steps=1, sample_every=100)
    train(own)  # the first update has rate 0
    tensors = read_tensors(tmp_path / "stage_c.safetensors")
    published = load_file(model / "stage_c.safetensors")
    assert len(tensors) == len(published)
    for name, tensor in published.items():
        assert torch.equal(tensors[name.replace("in_proj_", "in_proj.")], tensor)


def test_a_start_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='init: there is no model or file "minu"; did you mean "mini"'):
        train(settings("stage_c", Path("minu"), tmp_path))
