"""Each published competitor's pipeline, tiny and random, loaded the ordinary way and drawing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import published_folders
import pytest
import torch
from tiny_pipelines import write_sdxl, write_wuerstchen

from triptych.errors import CheckpointError, MissingExtra, SettingsError
from triptych.evaluation.diffusers_systems import (
    PRESETS,
    WUERSTCHEN_LEVELS,
    DiffusersSettings,
    DiffusersSystem,
    with_preset,
)
from triptych.evaluation.systems import Drawn, Task

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers deprecates in itself is not ours to mend
SMALL = {"device": "cpu", "dtype": "float32"}
TASKS = [Task(0, "a red star", 5, "00000-5"), Task(1, "a blue circle", 6, "00001-6")]


def drawn_by(name: str, tasks: list[Task] = TASKS, **changes: object) -> list[Drawn]:
    system = DiffusersSystem(name, DiffusersSettings(**with_preset(name, {**SMALL, **changes})), name)
    system.load()
    made = list(system.draw(tasks))
    system.close()
    return made


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("name", ["sdxl", "sdxl-turbo", "playground-v2"])
def test_pipelines_of_sdxls_class_draw(name: str, sdxl: Path) -> None:
    steps = min(PRESETS[name]["steps"], 2)
    made = drawn_by(name, model=str(sdxl), size="32x32", steps=steps)
    assert [one.image.size for one in made] == [(32, 32)] * 2
    settings = made[1].metadata["settings"]
    assert (settings["preset"], settings["guidance"]) == (name, PRESETS[name]["guidance"])
    assert settings["diffusers"].startswith("0.")
    assert made[1].metadata["seed"] == 6


def test_a_seed_means_the_same_alone_and_in_a_batch_and_as_diffusers_itself(sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    alone = drawn_by("sdxl", TASKS[1:], model=str(sdxl), size="32x32", steps=2)[0].image
    batch = drawn_by("sdxl", model=str(sdxl), size="32x32", steps=2, batch=2)[1].image
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(6)
    said = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 5.0}
    plain = pipe("a blue circle", generator=generator, **said).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(plain))
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(batch, dtype=int)).max() <= 1


def test_wuerstchen_draws_with_its_published_levels_and_class_names(tmp_path: Path) -> None:
    decoder, prior = write_wuerstchen(tmp_path)
    made = drawn_by(
        "wuerstchen-v2",
        TASKS[:1],
        model=str(decoder),
        prior_model=str(prior),
        size="128x128",
        steps=2,
        prior_timesteps=[1.0, 0.5, 0.0],
    )
    assert made[0].image.mode == "RGB"
    from diffusers.pipelines.deprecated.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS

    assert pytest.approx(DEFAULT_STAGE_C_TIMESTEPS) == WUERSTCHEN_LEVELS


def test_stable_cascade_draws_with_its_published_class_names(tmp_path: Path) -> None:
    folder = published_folders.write_diffusers(tmp_path)
    made = drawn_by(
        "stable-cascade",
        TASKS[:1],
        model=str(folder / "stable-cascade"),
        prior_model=str(folder / "stable-cascade-prior"),
        size="256x256",
        steps=1,
        prior_steps=1,
    )
    assert made[0].image.size == (256, 256)


def test_any_pipeline_by_its_class(sdxl: Path) -> None:
    settings = DiffusersSettings(
        pipeline="DiffusionPipeline", model=str(sdxl), steps=1, arguments={"height": 16, "width": 16}, **SMALL
    )
    system = DiffusersSystem("mine", settings)
    system.load()
    assert next(system.draw(TASKS)).image.size == (16, 16)


def test_mistakes_are_explained(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match='has no pipeline "SDXLPipeline"'):
        drawn_by("sdxl", model=str(sdxl), pipeline="SDXLPipeline")
    with pytest.raises(CheckpointError, match="diffusers cannot load StableDiffusionXLPipeline from"):
        drawn_by("sdxl", model=str(tmp_path))
    with pytest.raises(SettingsError, match="prior_steps, but no prior_pipeline"):
        drawn_by("sdxl", prior_steps=3)
    with pytest.raises(SettingsError, match='no preset "sdxx"'):
        with_preset("sdxx", {})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"triptych\[compare\]"):
        drawn_by("sdxl", model=str(sdxl))
