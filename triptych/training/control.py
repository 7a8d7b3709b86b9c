"""Training a ControlNet: hints made of pictures as they come, a frozen Stage C, a small network that learns.

The loss is Stage C's own, with the residuals of the hint added; Stage C stays in eval mode and keeps no
gradients of its weights. What the residuals are to do follows from how Stage C was trained, so prediction and
sampling defaults are read from its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo
from triptych.checkpoints.load import describe_part
from triptych.conditioning.faces import FaceReader
from triptych.conditioning.hints import KINDS, Kind, Tools
from triptych.data.batches import BatchPlan
from triptych.diffusion.loss import AdaptiveWeight
from triptych.errors import SettingsError, nearest
from triptych.images import grid, to_images
from triptych.models.controlnet import CONTROLNET, ControlNet, ControlNetConfig
from triptych.models.stage_c import StageC, StageCConfig
from triptych.training.config import RunSettings
from triptych.training.draws import Draws
from triptych.training.encoders import Encoders, encode_pictures, frozen, load_encoders, part_path
from triptych.training.recipes import (
    DiffusionBatch,
    encode_batch,
    first_batch,
    open_diffusion_cache,
    run_sampler,
    stage_c_loss,
)
from triptych.training.sources import Pictures
from triptych.training.start import network_config, trained_info
from triptych.training.task import Losses, Task

SHOWN = 4  # pictures in a sample grid
FROM_STAGE_C = ("shift", "steps", "guidance", "rescale", "sampler")  # settings that sampling follows


def controlnet_task(
    settings: RunSettings, pictures: Pictures, device: torch.device, progress: Callable[[int, int], None]
) -> Task:
    """A ControlNet for the kind of hint `control.hint`. Raises SettingsError for what does not fit."""
    kind = kind_of(settings)
    stage_c, settings = frozen_stage_c(settings, device)
    needed = ["semantic", "text_encoder", "image_encoder"]
    if settings.data.cache and (settings.data.random_crop or settings.data.zoom != 1):
        raise SettingsError(
            "data.cache holds the latents of whole pictures: with it, a ControlNet needs data."
            "random_crop = false and data.zoom = 1.0, so that hints show the same."
        )
    encoders = load_encoders(settings.parts, needed, device)
    network = build_controlnet(settings, kind, stage_c.config, encoders).to(device)
    tools = hint_tools(settings, kind, encoders)
    cache = open_diffusion_cache(settings, pictures, encoders, needed, device, progress)
    adaptive = AdaptiveWeight()

    def load(plan: BatchPlan, places: Sequence[int]) -> DiffusionBatch:
        batch = pictures.load(plan, places)
        told = [pictures.told_of(plan, place) for place in places]
        if cache is None:
            return DiffusionBatch(plan, places, batch, pictures.captions(batch, told))
        numbers = [
            pictures.caption_number(plan, place, cache.captions[sample])
            for place, sample in zip(places, told, strict=True)
        ]
        encoded = cache.read([plan.samples[place] for place in places], numbers, told)
        return DiffusionBatch(plan, places, batch, [], encoded)

    def loss(player: str, batch: DiffusionBatch, draws: Draws, step: int) -> Losses:
        assert batch.pictures is not None
        encoded = batch.encoded or encode_batch(settings, encoders, batch, device)
        with torch.no_grad():
            hint = kind.make(batch.pictures.pixels.to(device), draws.uniform, tools)
        residuals = network(hint.to(device))

        def controlled(*told: Any) -> Tensor:
            return stage_c(*told, residuals=residuals)

        return stage_c_loss(settings, controlled, encoded, draws, adaptive, encoders, device)

    @torch.no_grad()
    def sample(trained: dict[str, nn.Module], out: Path) -> Image.Image:
        return sample_controlnet(
            settings, trained["controlnet"], stage_c, kind, tools, encoders, pictures, device
        )

    def info(part: str, network: nn.Module) -> PartInfo:
        return trained_info(settings, part, network, {"hint": settings.control.hint})

    return Task(
        {"controlnet": network}, pictures.order(cache.buckets if cache else None),
        load, loss, info, sample,
        players={"controlnet": ["controlnet"]}, tables={"adaptive": adaptive},
        skipped=pictures.skipped, key_of=pictures.source.key, trunks=[stage_c],
    )  # fmt: skip


def kind_of(settings: RunSettings) -> Kind:
    name = settings.control.hint
    if name not in KINDS:
        raise SettingsError(f'control.hint "{name}": {nearest(name, KINDS)}.')
    return KINDS[name]


def frozen_stage_c(settings: RunSettings, device: torch.device) -> tuple[StageC, RunSettings]:
    """Stage C without gradients, and the settings with its prediction and its sampling."""
    stage_c = frozen("stage_c", settings.parts.stage_c, device)
    assert isinstance(stage_c, StageC)
    told = describe_part(part_path("stage_c", settings.parts.stage_c), "stage_c").settings
    sampling = {name: told[name] for name in FROM_STAGE_C if name in told} | settings.diffusion.sampling
    prediction = told.get("prediction", settings.diffusion.prediction)
    diffusion = settings.diffusion.model_copy(update={"prediction": prediction, "sampling": sampling})
    return stage_c, settings.model_copy(update={"diffusion": diffusion})


def build_controlnet(
    settings: RunSettings, kind: Kind, stage_c: StageCConfig, encoders: Encoders
) -> ControlNet:
    """The network for a hint and a Stage C; its EfficientNet begins as the semantic encoder's, if alike."""
    network = ControlNet(controlnet_config(settings, kind, stage_c))
    if settings.control.pretrained and encoders.semantic is not None:
        network.start_from(encoders.semantic.state_dict())
    return network


def controlnet_config(settings: RunSettings, kind: Kind, stage_c: StageCConfig) -> ControlNetConfig:
    """The config for a hint and a Stage C. Raises SettingsError where they do not fit."""
    config: ControlNetConfig = network_config(settings, "controlnet", CONTROLNET)
    bottleneck = settings.network.get("bottleneck", kind.bottleneck)
    config = dataclasses.replace(config, channels=kind.channels, bottleneck=bottleneck)
    if set(stage_c.widths) != {config.width}:
        raise SettingsError(
            f'size "{settings.size}": a ControlNet of width {config.width} does not fit a Stage C of width '
            f"{stage_c.widths[0]}; set network.width, or name another size."
        )
    if config.blocks[-1] >= stage_c.conv_blocks:
        raise SettingsError(
            f"network.blocks ends with {config.blocks[-1]}; this Stage C has blocks 0 to "
            f"{stage_c.conv_blocks - 1}."
        )
    return config


def hint_tools(settings: RunSettings, kind: Kind, encoders: Encoders) -> Tools:
    """What this kind of hint is made with. Raises SettingsError when a file is needed and not named."""
    control = settings.control
    tools = Tools(semantic=encoders.semantic, box_share=control.box_share, shrink=control.shrink)
    if control.saliency is not None:
        tools.saliency = frozen("saliency", control.saliency, torch.device("cpu"))
    if "edges" in kind.needs:
        if control.pidinet is None:
            raise SettingsError("control.pidinet: soft edges need the edge network PiDiNet; name its file.")
        tools.edges = frozen("pidinet", control.pidinet, torch.device("cpu"))
    if "faces" in kind.needs:
        if control.face_model is None:
            raise SettingsError("control.face_model: identity needs an ONNX file that reads faces.")
        tools.faces = FaceReader(control.face_model, control.face_detector)
    return tools


def sample_controlnet(
    settings: RunSettings,
    network: nn.Module,
    stage_c: StageC,
    kind: Kind,
    tools: Tools,
    encoders: Encoders,
    pictures: Pictures,
    device: torch.device,
) -> Image.Image:
    """Three rows: hints, what they and the captions lead to, and the true pictures, as previews."""
    assert encoders.text is not None
    batch = first_batch(pictures, SHOWN)
    pixels = batch.pixels.to(device)
    hint = kind.make(pixels, Draws(settings.seed, 0, range(len(pixels))).uniform, tools).to(device)
    residuals = network(hint)
    captions = [sample.caption for sample in batch.samples]
    hidden, pooled = (told.to(device) for told in encoders.text.encode([*captions, *[""] * len(captions)]))

    def predict(x: Tensor, t: Tensor, branches: Sequence[str]) -> list[Tensor]:
        both = len(branches)
        rows = slice(0, both * len(captions))
        added = [None if r is None else torch.cat([r] * both) for r in residuals]
        answer = stage_c(
            torch.cat([x] * both), torch.cat([t] * both), hidden[rows], pooled[rows], residuals=added
        )
        return list(answer.chunk(both))

    latents, _, _ = encode_pictures(dataclasses.replace(encoders, stage_a=None, image=None), pixels)
    made = run_sampler(predict, tuple(latents.shape), settings, device)
    previewer = frozen("previewer", settings.parts.previewer, device)
    shown, true = previewer(made), previewer(latents)
    told = F.interpolate(seen(hint).float(), shown.shape[-2:], mode="area")
    return grid(to_images(F.interpolate(torch.cat([told, shown, true]), scale_factor=2)), columns=len(pixels))


def seen(hint: Tensor) -> Tensor:
    """A hint as three channels in [0,1]: pictures as they are, latents and vectors by their length."""
    if hint.shape[1] in (3, 4):
        return hint[:, :3]
    if hint.shape[1] == 1:
        return hint.expand(-1, 3, -1, -1)
    length = hint.norm(dim=1, keepdim=True)
    return (length / length.amax().clamp_min(1e-6)).expand(-1, 3, -1, -1)
