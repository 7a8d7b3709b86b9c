"""Configurations of networks worked out from the shapes in a weight file that carries none.

Published files have no configuration inside. Everything that shapes parameters can be read off them; what
cannot is assumed as published: heads of 64 channels, dropout 0.1 where there is attention, self-attention
on, no resampling between Stage C's levels, Stage A's scale 0.43, the usual blocks of a ControlNet. Names
are ours (`keys.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from triptych.errors import CheckpointError
from triptych.models.controlnet import PUBLISHED_BLOCKS, PUBLISHED_CONTROLNETS, ControlNetConfig
from triptych.models.pidinet import PiDiNetConfig
from triptych.models.saliency import SaliencyConfig
from triptych.models.semantic import SEMANTIC, PreviewerConfig, SemanticConfig, SemanticEncoder
from triptych.models.stage_a import StageAConfig
from triptych.models.stage_b import STAGE_B, StageBConfig
from triptych.models.stage_c import STAGE_C, StageCConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 64  # in all published sizes
EXTRA_TIMES = ("sca", "crp")
PATCH = {"stage_b": 2, "stage_c": 1}


def infer_config(part: str, shapes: Shapes, heads: tuple[int, ...] | None = None) -> Any:
    """The configuration of a part's network from its parameters' shapes, in our names.

    `heads` gives the attention heads per level where they are not width / 64. Raises `CheckpointError` when
    the names or shapes make no network of that kind.
    """
    try:
        if part == "stage_c":
            return _published(_stage_c(shapes, heads), STAGE_C)
        if part == "stage_b":
            return _published(_stage_b(shapes, heads), STAGE_B)
        if part == "stage_a":
            return _stage_a(shapes)
        if part == "semantic":
            return _semantic(shapes)
        if part == "previewer":
            return _previewer(shapes)
        if part == "controlnet":
            return _controlnet(shapes)
        if part == "saliency":
            return SaliencyConfig((*(shapes[f"downsampler.{n}.weight"][0] for n in (1, 5, 9)),
                                   shapes["residual.1.weight"][0]))  # fmt: skip
        if part == "pidinet":
            return PiDiNetConfig(shapes["init_block.weight"][0], shapes["dilations.0.conv1.weight"][0])
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The names in the file look like {part}, but make no network of it (first trouble at {error})."
        ) from None
    raise CheckpointError(f'The configuration of a part "{part}" cannot be told from its weights.')


def _published(config: Any, presets: Mapping[str, Any]) -> Any:
    """The published preset where only heads of levels without attention differ, else the config itself."""
    for preset in presets.values():
        if len(preset.widths) != len(config.widths):
            continue
        if dataclasses.replace(config, heads=preset.heads) == preset and _same_heads(config, preset):
            return preset
    return config


def _same_heads(config: Any, preset: Any) -> bool:
    return all(
        mine == theirs
        for mine, theirs, pattern in zip(config.heads, preset.heads, config.patterns, strict=True)
        if "A" in pattern
    )


def _stage_c(shapes: Shapes, heads: tuple[int, ...] | None) -> StageCConfig:
    trunk = _trunk(shapes, PATCH["stage_c"], "clip_txt_pooled_mapper", heads)
    trunk["dropout"] = (0.1,) * len(trunk["widths"])
    return StageCConfig(
        **trunk,
        text_width=shapes["clip_txt_mapper.weight"][1],
        image_width=shapes["clip_img_mapper.weight"][1],
        level_switch=(False,) * (len(trunk["widths"]) - 1),
    )


def _stage_b(shapes: Shapes, heads: tuple[int, ...] | None) -> StageBConfig:
    return StageBConfig(
        **_trunk(shapes, PATCH["stage_b"], "clip_mapper", heads),
        semantic_channels=shapes["effnet_mapper.0.weight"][1],
        pixel_channels=shapes["pixels_mapper.0.weight"][1],
    )


def _trunk(shapes: Shapes, patch: int, pooled: str, heads: tuple[int, ...] | None) -> dict[str, Any]:
    """The fields of `TrunkConfig`."""
    blocks: dict[str, dict[int, str]] = {}  # "down_blocks.0" -> block index -> kind
    for name in shapes:
        place, kind = _block_kind(name)
        if place is not None:
            side, level, index = place
            blocks.setdefault(f"{side}.{level}", {})[index] = kind
    levels = sum(1 for key in blocks if key.startswith("down_blocks."))
    down = [_sequence(blocks[f"down_blocks.{level}"]) for level in range(levels)]
    up = [_sequence(blocks[f"up_blocks.{index}"]) for index in range(levels)]
    patterns = tuple(_pattern(down[level], up[levels - 1 - level]) for level in range(levels))
    widths = tuple(_width(shapes, f"down_blocks.{level}", down[level]) for level in range(levels))
    cond_width = _cond_width(shapes)
    found = _first(shapes, ".mapper.weight")
    mapped, pooled_width = shapes[f"{pooled}.weight"]
    with_attention = ["A" in pattern for pattern in patterns]
    return {
        "channels": shapes["embedding.1.weight"][1] // patch**2,
        "patch": patch,
        "widths": widths,
        "heads": heads
        or tuple(max(1, w // HEAD_WIDTH) if a else 0 for w, a in zip(widths, with_attention, strict=True)),
        "patterns": patterns,
        "down_blocks": tuple(len(down[level]) // len(patterns[level]) for level in range(levels)),
        "up_blocks": tuple(len(up[i]) // len(patterns[levels - 1 - i]) for i in range(levels)),
        "down_repeats": tuple(_repeats(shapes, f"down_repeat_mappers.{level}") for level in range(levels)),
        "up_repeats": tuple(_repeats(shapes, f"up_repeat_mappers.{index}") for index in range(levels)),
        "cond_width": cond_width,
        "tokens_per_vector": mapped // cond_width,
        "pooled_width": pooled_width,
        "time_size": shapes[found][1] if found else 64,
        "extra_times": tuple(t for t in EXTRA_TIMES if _first(shapes, f".mapper_{t}.weight")),
        "kernel": shapes[_first(shapes, ".depthwise.weight") or ""][-1],
        "dropout": tuple(0.1 if attention else 0.0 for attention in with_attention),
        "self_attention": (True,) * levels,
    }


def _block_kind(name: str) -> tuple[tuple[str, int, int] | None, str]:
    pieces = name.split(".")
    if pieces[0] not in ("down_blocks", "up_blocks") or len(pieces) < 4:
        return None, ""
    kinds = {"depthwise": "C", "mapper": "T", "attention": "A", "kv_mapper": "A"}
    place = (pieces[0], int(pieces[1]), int(pieces[2]))
    if pieces[3] in kinds:
        return place, kinds[pieces[3]]
    return None, ""


def _sequence(blocks: Mapping[int, str]) -> str:
    return "".join(blocks[index] for index in range(len(blocks)))


def _pattern(down: str, up: str) -> str:
    """The shortest text that both sequences repeat."""
    for length in range(1, len(down) + 1):
        pattern = down[:length]
        if all(len(s) % length == 0 and pattern * (len(s) // length) == s for s in (down, up)):
            return pattern
    raise ValueError(f"blocks {down[:20]} down and {up[:20]} up")


def _width(shapes: Shapes, level: str, sequence: str) -> int:
    if "C" in sequence:
        return shapes[f"{level}.{sequence.index('C')}.depthwise.weight"][0]
    return shapes[f"{level}.{sequence.index('T')}.mapper.weight"][0] // 2


def _cond_width(shapes: Shapes) -> int:
    attention = _first(shapes, ".kv_mapper.1.weight")
    return shapes[attention][1] if attention else shapes["clip_txt_mapper.weight"][0]


def _first(shapes: Shapes, ending: str) -> str | None:
    return next((name for name in shapes if name.endswith(ending)), None)


def _repeats(shapes: Shapes, prefix: str) -> int:
    return 1 + sum(1 for name in shapes if name.startswith(prefix + ".") and name.endswith(".weight"))


def _stage_a(shapes: Shapes) -> StageAConfig:
    def mixing(side: str) -> int:
        return sum(1 for name in shapes if name.startswith(side) and name.endswith(".gammas"))

    levels = mixing("down_blocks.")
    codes, latent = shapes["vquantizer.codebook.weight"]
    return StageAConfig(
        levels=levels,
        width=shapes["up_blocks.0.0.weight"][0],
        bottleneck_blocks=mixing("up_blocks.") - (levels - 1),
        latent_channels=latent,
        codes=codes,
    )


def _semantic(shapes: Shapes) -> SemanticConfig:
    """Strides do not show in shapes, so only the known sizes can be told apart."""
    for config in SEMANTIC.values():
        with torch.device("meta"):
            expected = SemanticEncoder(config).state_dict()
        if {name: tuple(tensor.shape) for name, tensor in expected.items()} == dict(shapes):
            return config
    # A damaged published file should be measured against the published network.
    if shapes["mapper.0.weight"][1] == SEMANTIC["full"].features:
        return SEMANTIC["full"]
    raise ValueError("mapper.0.weight")


def _previewer(shapes: Shapes) -> PreviewerConfig:
    width, latent = shapes["blocks.0.weight"][:2]
    return PreviewerConfig(latent, width, shapes["blocks.24.weight"][0])


def _controlnet(shapes: Shapes) -> ControlNetConfig:
    """The encoder is told by its names; the list of blocks, which no official file holds, by its length."""
    count = sum(1 for name in shapes if name.startswith("projections.") and name.endswith(".2.weight"))
    width, features = shapes["projections.0.2.weight"][:2]
    blocks = PUBLISHED_BLOCKS if count == len(PUBLISHED_BLOCKS) else tuple(range(count))
    if "backbone.0.0.weight" in shapes:
        stem, channels = shapes["backbone.0.0.weight"][:2]
        known = (size for size in SEMANTIC.values() if (size.stem, size.features) == (stem, features))
        encoder = next(known, SEMANTIC["full"])
        return ControlNetConfig(
            channels, "effnet", blocks, width, encoder.features, encoder.stem, encoder.stages
        )
    first, channels = shapes["backbone.0.weight"][:2]
    deep = sum(1 for name in shapes if name.endswith(".blocks.0.weight"))
    if not deep:
        preset = PUBLISHED_CONTROLNETS["identity"]
        return dataclasses.replace(preset, channels=channels, blocks=blocks, width=width)
    hidden = shapes["backbone.2.weight"][0]
    return ControlNetConfig(
        channels, "large", blocks, width, features, first_width=first, hidden=hidden, residual_blocks=deep
    )
