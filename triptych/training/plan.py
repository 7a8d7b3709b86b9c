"""The memory a training run will take, by part, before anything is loaded.

Networks are built without values; what the forward and backward pass keep is counted by running them so
(footprint.py). Python, its libraries and pages of files that are only mapped are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from triptych.checkpoints.catalog import (
    PUBLISHED,
    PUBLISHED_SETTINGS,
    SHARED_FILES,
    TOWER_AT_ONCE,
    TOWER_PARAMETERS,
    find_model,
)
from triptych.checkpoints.files import read_header
from triptych.checkpoints.load import read_part
from triptych.conditioning.towers import weight_file
from triptych.models.controlnet import ControlNet
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.needs import need_of
from triptych.training.adamw8bit import BLOCK, CHUNK, SMALLEST
from triptych.training.checkpointing import is_matrix
from triptych.training.config import RunSettings
from triptych.training.encoders import part_path
from triptych.training.footprint import WIDE, backward_peak, trace
from triptych.training.muon import TOGETHER, leave_to_adamw
from triptych.training.muon import is_matrix as by_muon
from triptych.training.plan_pixels import PIXEL_RECIPES, control_step, pixel_step
from triptych.training.start import following_init, network_config, sized_for

STORED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}  # bytes a number of a matrix
UPDATE_COPIES = {"adafactor": 4, "adamw8bit": 1, "muon": 6}  # of the largest weight, float32
TEXT_TOKENS = 77
Network = TypeVar("Network", bound=nn.Module)
CAPTION_BYTES = 2**16  # of an embedded caption in a batch


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the fullest moment of a step."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_memory(settings: RunSettings) -> MemoryPlan:
    """What a run of any recipe will take."""
    if published(settings) is None:
        settings = following_init(settings)
    elif settings.recipe in ("lora", "stage_b", "stage_c"):  # likewise, but nothing is downloaded for a plan
        data = sized_for(settings.data, PUBLISHED_SETTINGS["stage_c"])
        settings = settings.model_copy(update={"data": data})
    networks, helpers, maps, gradients = fullest_step(settings)
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    learned = [*trained, *(p for network in helpers for p in network.parameters())]
    held = 0.0 if settings.optim.fused_backward else STORED[settings.weights]
    all_gradients = int(held * sum(p.numel() for p in learned))
    step = all_gradients + update_working(settings, learned)
    if step > maps + gradients:  # the fullest moment is the update
        maps, gradients = step - all_gradients, all_gradients
    frozen = [p for network in networks for p in network.parameters() if not p.requires_grad]
    storage = settings.lora.base if settings.recipe == "lora" else settings.weights
    parts = {
        "weights": weight_bytes(learned, settings.weights) + weight_bytes(frozen, storage),
        "gradients": gradients,
        "optimiser": optimizer_bytes(settings, learned),
        "average": WIDE * sum(p.numel() for p in trained) if settings.ema.enabled else 0,
        "maps and working memory": maps,
        "frozen parts": frozen_bytes(settings),
        "loader": loader_bytes(settings),
    }
    return MemoryPlan(parts)


def fullest_step(settings: RunSettings) -> tuple[list[nn.Module], list[nn.Module], int, int]:
    """Networks of a run, helpers that are not written, and bytes of maps and gradients at most."""
    named = published(settings)
    if settings.recipe in PIXEL_RECIPES:
        if named is not None:
            settings = settings.model_copy(update={"init": None, "size": "full"})
        return pixel_step(settings)
    if settings.recipe == "controlnet":
        return control_networks(settings)
    lora = settings.recipe == "lora"
    networks: list[nn.Module] = base_networks(settings) if lora else [trained_network(settings)]
    storage = settings.lora.base if lora else settings.weights
    held = 0.0 if settings.optim.fused_backward else STORED[settings.weights]
    copies = UPDATE_COPIES.get(settings.optim.kind, 1) + (2 if settings.weights == "bfloat16" else 0)
    maps = gradients = 0
    for network in networks:
        runs, outside = trace(network, step_inputs(settings, network))
        moment = backward_peak(runs, outside, settings.checkpointing, storage != "float32", held, copies)
        maps, gradients = maps + moment[0], gradients + moment[1]
    return networks, [], maps, gradients


def control_networks(settings: RunSettings) -> tuple[list[nn.Module], list[nn.Module], int, int]:
    """A ControlNet and its frozen Stage C."""
    from triptych.training.control import controlnet_config, kind_of

    given, kind = settings.parts.stage_c, kind_of(settings)
    if given in PUBLISHED:
        config = STAGE_C[PUBLISHED[given].stage_c]
    else:
        config = read_part(part_path("stage_c", given), "stage_c").config
    stage_c = without_values(StageC, config).requires_grad_(False)
    network = without_values(ControlNet, controlnet_config(settings, kind, config))
    inputs = step_inputs(settings, stage_c)
    side = settings.data.size // (32 if kind.bottleneck == "large" else 1)
    hint = torch.empty(len(inputs["x"]), kind.channels, side, side, device="meta")
    return [network, stage_c], [], *control_step(settings, network, hint, stage_c, inputs)


def trained_network(settings: RunSettings) -> nn.Module:
    """Stage B or C without values."""
    presets: Any = STAGE_B if settings.recipe == "stage_b" else STAGE_C
    named = published(settings)
    if named is not None and "size" not in settings.model_fields_set:
        settings = settings.model_copy(update={"size": getattr(PUBLISHED[named], settings.recipe)})
    if named is not None:
        settings = settings.model_copy(update={"init": None})
    config = network_config(settings, settings.recipe, presets)
    network: Any = without_values(StageB if settings.recipe == "stage_b" else StageC, config)
    if getattr(config, "guess", 0):
        leave_to_adamw(network.guess)
    return network


def base_networks(settings: RunSettings) -> list[nn.Module]:
    """The base of a LoRA without values, published or on disk, with adapters."""
    from triptych.training.lora import inject

    networks: list[nn.Module] = []
    for part in settings.lora.parts:
        build, presets = (StageB, STAGE_B) if part == "stage_b" else (StageC, STAGE_C)
        if settings.lora.model in PUBLISHED:
            config = presets[getattr(PUBLISHED[settings.lora.model], part)]
        else:
            path = getattr(find_model(settings.lora.model), part)
            config = read_part(path, part).config
        network = without_values(build, config).requires_grad_(False)
        inject(network, settings.lora, part)
        networks.append(network)
    return networks


def published(settings: RunSettings) -> str | None:
    """The published model that a run begins with or teaches, None for one on disk or a new one."""
    named = settings.lora.model if settings.recipe == "lora" else settings.init
    return named if named in PUBLISHED else None


def without_values(build: Callable[[Any], Network], config: Any) -> Network:
    with torch.device("meta"):
        return build(config)


def step_inputs(settings: RunSettings, network: Any) -> dict[str, torch.Tensor]:
    """What one accumulated part of a batch gives to a network; a LoRA's prior runs beside its pictures."""
    count = max(1, settings.batch // settings.accumulate)
    if settings.recipe == "lora" and settings.lora.prior:
        count *= 2
    side, config = settings.data.size, network.config
    semantic = (count, getattr(config, "semantic_channels", 16), side // 32, side // 32)
    told = {"t": (count,), "text_pooled": (count, config.pooled_width)}
    if isinstance(network, StageB):
        told |= {"x": (count, config.channels, side // 4, side // 4), "semantic": semantic}
    else:
        told |= {"x": semantic, "text_hidden": (count, TEXT_TOKENS, config.text_width)}
    return {name: torch.empty(shape, device="meta") for name, shape in told.items()}


def weight_bytes(parameters: Iterable[nn.Parameter], storage: str) -> int:
    """Matrices in their storage, everything else in float32."""
    return int(sum(p.numel() * (STORED[storage] if is_matrix(p) else WIDE) for p in parameters))


def optimizer_bytes(settings: RunSettings, parameters: Iterable[nn.Parameter]) -> int:
    """What the optimiser remembers."""
    return sum(state_bytes(settings.optim.kind, p) for p in parameters)


def state_bytes(kind: str, p: nn.Parameter) -> int:
    """What an optimiser of this kind remembers of one parameter, float32 unless its name says otherwise."""
    if kind == "muon" and by_muon(p):
        return WIDE * p.numel()
    if kind == "adafactor" and p.ndim >= 2:
        return WIDE * (math.prod(p.shape[:-1]) + math.prod(p.shape[:-2]) * p.shape[-1])
    if kind == "adafactor":
        return WIDE * p.numel()
    if kind == "adamw8bit" and p.numel() >= SMALLEST:
        return 2 * (p.numel() + WIDE * p.numel() // BLOCK)
    return 2 * WIDE * p.numel()


def update_working(settings: RunSettings, parameters: list[nn.Parameter]) -> int:
    """Bytes an update makes meanwhile, where it is not inside the backward pass."""
    kind = settings.optim.kind
    largest = max(p.numel() for p in parameters)
    if kind == "muon":
        together: dict[torch.Size, int] = {}
        for p in parameters:
            if by_muon(p):
                together[p.shape] = together.get(p.shape, 0) + p.numel()
        largest = max((min(total, max(TOGETHER, largest)) for total in together.values()), default=0)
    if kind == "adamw8bit":
        largest = min(largest, 6 * CHUNK)
    rounded = 3 * WIDE * largest if settings.weights == "bfloat16" else 0
    return UPDATE_COPIES.get(kind, 0) * WIDE * largest + rounded


def frozen_bytes(settings: RunSettings) -> int:
    """Encoders beside the run; a cache leaves only the text encoder, which a LoRA holds like its base. Of
    towers that stay in their files one layer is there."""
    if settings.recipe in ("stage_a", "semantic"):
        return 0
    text = STORED[settings.lora.base] if settings.recipe == "lora" else WIDE
    apart = settings.parts.offload
    named = published(settings)
    if named is not None:
        return int(part_numbers("text_encoder", named, apart) * text)
    source: Any = find_model(settings.lora.model) if settings.recipe == "lora" else settings.parts
    total = 0.0
    for part in frozen_parts(settings):
        given = getattr(source, part)
        total += (text if part == "text_encoder" else WIDE) * part_numbers(part, given, apart)
    return int(total)


def frozen_parts(settings: RunSettings) -> list[str]:
    """The encoders that are there while a run of this kind trains."""
    if settings.recipe == "image_encoder":
        return ["text_encoder"]
    if settings.recipe == "controlnet":  # its hints and samples go on needing them
        return ["text_encoder", "semantic", "image_encoder", *(["stage_a"] if settings.data.cache else [])]
    needed = ["text_encoder"] if settings.data.cache else ["text_encoder", "semantic"]
    shown = settings.recipe == "stage_b" or "stage_b" in settings.lora.parts
    return [*needed, "stage_a"] if shown else needed


def part_numbers(part: str, given: str | Path | None, apart: bool = False) -> int:
    """Numbers in a part that a setting names; of a tower, if `apart`, those that are there at a time.

    Nothing is downloaded.
    """
    if given is None:
        return 0
    if given in PUBLISHED:
        towers = TOWER_AT_ONCE if apart else TOWER_PARAMETERS
        return towers[part] if part in towers else SHARED_FILES[part][2]
    path = weight_file(part_path(part, str(given)), part)
    return numbers_at_once(path) if apart and part in TOWER_PARAMETERS else numbers_in(path)


def numbers_in(path: Path) -> int:
    """Numbers in a weight file, scales of int8 rows included."""
    return sum(math.prod(entry.shape) for entry in read_header(path).entries.values())


def numbers_at_once(path: Path) -> int:
    """Numbers outside of a tower's layers, and in the largest layer."""
    shapes = {name: entry.shape for name, entry in read_header(path).entries.items()}
    need = need_of("tower", shapes, WIDE, working=0)
    return need.rest + need.block


def loader_bytes(settings: RunSettings) -> int:
    """Batches at hand and read ahead, with the pictures they are made from."""
    pixels = 0 if settings.data.cache else 3 * settings.data.size**2 * WIDE
    ahead = settings.data.readers + 2
    return ahead * settings.batch * (pixels + CAPTION_BYTES)


def show_plan(plan: MemoryPlan) -> str:
    """The plan as lines of a table, in GiB."""
    rows = [*plan.parts.items(), ("together", plan.total)]
    return "\n".join(f"{name:<24}{size / 2**30:8.2f} GiB" for name, size in rows)
