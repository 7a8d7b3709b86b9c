"""Making Stages B and C fit float16, exactly (ARCHITECTURE.md section 18.1 of the published model).

The residual stream of these networks grows from block to block, past 65504 where float16 ends. Blocks read
the stream through a layer norm, which removes any factor, so a smaller stream s * x, with s a power of two,
computes the same as long as everything that is added to it is scaled by s as well:

    C and F blocks    last linear, weight and bias; the depthwise bias, which is added before the norm
    A blocks          out-projection, weight and bias
    T blocks          the shift half of every mapper (the scale half multiplies the stream and stays)
    1x1 gaps          bias (a gap is the convolution between two passes over the same blocks)
    ControlNet        residuals
    skips             join after the norm, unscaled: the matching columns of the first linear are divided by s

The norms between levels and before the exit remove s for good. Powers of two make every product exact, and a
norm that reads s * x gets its epsilon times s * s, so nothing is left over but rounding.

How s is chosen: a probe runs the network once in float32, on fixed random latents and conditions at three
times, and takes the largest number in the stream after each block. From block to block s is lowered as far
as needed to keep that number at or below `CEILING`, 128 times under float16's limit: room for what real
prompts and larger pictures bring. It is lowered no further, so that small numbers keep their precision.
So s depends on nothing but the weights, and a network whose stream stays small is not changed at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triptych.models.blocks import (
    NORM_EPS,
    AttentionBlock,
    ChannelNorm,
    ConvBlock,
    FeedForwardBlock,
    TimeBlock,
)
from triptych.models.stage_b import StageB
from triptych.models.stage_c import StageC
from triptych.models.trunk import Trunk

CEILING = 512.0
PROBE_TIMES = (1.0, 0.5, 0.02)
PROBE_SEED = 20240213
PROBE_TOKENS = 8
MARK = "float16_scales"


@dataclass(frozen=True)
class Level:
    """One level on one side of the trunk: its blocks, its gaps, and the names of the blocks."""

    name: str
    blocks: list[Any]
    gaps: list[Any]
    entry: nn.Module | None  # the scaler whose convolution feeds it; None where another level or a norm does

    @property
    def repeats(self) -> bool:
        return len(self.gaps) > 0


@dataclass(frozen=True)
class LevelScales:
    """s when a level is entered, and while each of its blocks computes."""

    start: float
    blocks: tuple[float, ...]

    @property
    def end(self) -> float:
        return self.blocks[-1] if self.blocks else self.start


def repair_float16(module: nn.Module) -> dict[str, float]:
    """Rescale the stream of a Stage B or C in place so that float16 holds it; returns block name -> s < 1.

    Call it on the weights as they are in the file, any precision, before `module.half()`; after adapters have
    been merged and before weights are moved. Other networks, and networks already repaired, are left alone.
    The repaired network still computes the same in float32, to rounding.
    """
    if not isinstance(module, Trunk) or hasattr(module, MARK):
        return {}
    levels = list(_levels(module))
    scales = _choose(levels, probe_peaks(module))
    for level in levels:
        _rescale_level(level, scales[level.name])
    _rescale_skips(module, scales)
    _rescale_norms(module, levels, scales)
    residual_scales = tuple(_residual_scales(levels, scales))
    if any(scale != 1 for scale in residual_scales) and isinstance(module, StageC):
        module.register_forward_pre_hook(partial(_scale_residuals, residual_scales), with_kwargs=True)
    changed = {
        f"{level.name}.{index}": scale
        for level in levels
        for index, scale in enumerate(scales[level.name].blocks)
        if scale != 1
    }
    setattr(module, MARK, changed)
    return changed


def _levels(trunk: Trunk) -> Iterator[Level]:
    """All levels in running order."""
    sides = (
        ("down_blocks", trunk.down_blocks, trunk.down_repeat_mappers, trunk.down_downscalers),
        ("up_blocks", trunk.up_blocks, trunk.up_repeat_mappers, trunk.up_upscalers),
    )
    blocks: Any
    gaps: Any
    for side, all_blocks, all_gaps, scalers in sides:
        for index, (blocks, gaps) in enumerate(zip(all_blocks, all_gaps, strict=True)):
            # Down level i is fed by scaler i, up level i by scaler i - 1; the deepest up level by none.
            feeding = index if side == "down_blocks" else index - 1
            entry = None if index == 0 else scalers[feeding]
            yield Level(f"{side}.{index}", list(blocks), list(gaps), entry)


@torch.no_grad()
def probe_peaks(module: Trunk) -> dict[str, float]:
    """The largest magnitude in the stream after each block, by block name, on fixed random inputs.

    Runs in float32 on the CPU, widening one block at a time, so it needs little memory beside the weights.
    """
    peaks: dict[str, float] = {}
    handles = []

    def note(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), float(output.abs().max()))

    for level in _levels(module):
        for index, block in enumerate(level.blocks):
            handles.append(block.register_forward_hook(partial(note, f"{level.name}.{index}")))
            handles += _widen_while_running(block)
        for gap in level.gaps:
            # A gap feeds the first block of the next pass.
            handles.append(gap.register_forward_hook(partial(note, f"{level.name}.0")))
    restore = _widen_rest(module)
    training = module.training
    try:
        module.eval()(**_probe_inputs(module))
    finally:
        for handle in handles:
            handle.remove()
        for tensor, stored in restore:
            tensor.data = stored
        module.train(training)
    return peaks


def _probe_inputs(module: Trunk) -> dict[str, Tensor]:
    """Unit normal latents and conditions, the same for every call."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    batch = len(PROBE_TIMES)
    times = torch.tensor(PROBE_TIMES)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    if isinstance(module, StageC):
        config = module.config
        side = 4 * 2 ** sum(config.level_switch)
        return {
            "x": normal(config.channels, side, side),
            "t": times,
            "text_hidden": normal(PROBE_TOKENS, config.text_width),
            "text_pooled": normal(1, config.pooled_width),
            "image_embed": normal(1, config.image_width),
        }
    if isinstance(module, StageB):
        side = 2 * module.config.patch * 2 ** (len(module.config.widths) - 1)
        return {
            "x": normal(module.config.channels, side, side),
            "t": times,
            "semantic": normal(module.config.semantic_channels, 4, 4),
            "text_pooled": normal(1, module.config.pooled_width),
        }
    raise TypeError(f"no probe for {type(module).__name__}")


def _widen_while_running(block: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that give a block float32 weights during its forward pass and the stored ones back after it."""
    stored: list[tuple[Tensor, Tensor]] = []

    def enter(*_: Any) -> None:
        for tensor in block.parameters():
            if tensor.dtype != torch.float32:
                stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def leave(*_: Any) -> None:
        while stored:
            tensor, data = stored.pop()
            tensor.data = data

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]


def _widen_rest(module: Trunk) -> list[tuple[Tensor, Tensor]]:
    """Give everything outside the blocks, which is small, float32 weights; returns how to undo it."""
    inside = {id(p) for level in _levels(module) for block in level.blocks for p in block.parameters()}
    restore: list[tuple[Tensor, Tensor]] = []
    for tensor in module.parameters():
        if id(tensor) not in inside and tensor.dtype != torch.float32:
            restore.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
    return restore


def _needed(peak: float) -> float:
    """The largest power of two, 1 at most, that brings `peak` to the ceiling or below."""
    if not math.isfinite(peak) or peak <= CEILING:
        return 1.0
    return 2.0 ** -math.ceil(math.log2(peak / CEILING))


def _choose(levels: Sequence[Level], peaks: Mapping[str, float]) -> dict[str, LevelScales]:
    """s for every level and block: it only falls while the stream runs on, and is 1 again behind a norm.

    Blocks of a level that is passed over several times serve every pass, so they share one s, which must
    hold from the level's entry on.
    """
    scales: dict[str, LevelScales] = {}
    current = 1.0
    for position, level in enumerate(levels):
        needs = [_needed(peaks[f"{level.name}.{index}"]) for index in range(len(level.blocks))]
        deepest_up = level.name == "up_blocks.0"
        current = current if deepest_up else 1.0
        if level.repeats:
            # The entry of the deepest up level is the end of the level before, lowered in advance below.
            shared = current if deepest_up or level.entry is None else min(needs, default=1.0)
            scales[level.name] = LevelScales(shared, (shared,) * len(needs))
        else:
            start, chosen = current, []
            for need in needs:
                current = min(current, need)
                chosen.append(current)
            following = levels[position + 1] if position + 1 < len(levels) else None
            if following is not None and following.name == "up_blocks.0" and following.repeats and chosen:
                ahead = [_needed(peaks[f"up_blocks.0.{index}"]) for index in range(len(following.blocks))]
                chosen[-1] = min(chosen[-1], *ahead)
            scales[level.name] = LevelScales(start, tuple(chosen))
        current = scales[level.name].end
    return scales


def _rescale_level(level: Level, scales: LevelScales) -> None:
    if scales.start != 1 and level.entry is not None:
        _multiply(next(m for m in level.entry.modules() if hasattr(m, "weight")), scales.start)
    before = scales.start
    for block, scale in zip(level.blocks, scales.blocks, strict=True):
        _rescale_block(block, scale)
        if scale != before:
            block.register_forward_pre_hook(partial(_scale_stream, scale / before))
        before = scale
    for gap in level.gaps:
        _scale_bias(gap, scales.end)


def _rescale_block(block: Any, scale: float) -> None:
    """Scale what a block adds to the stream."""
    if scale == 1:
        return
    if isinstance(block, ConvBlock | FeedForwardBlock | AttentionBlock):
        block.norm_eps = NORM_EPS * scale * scale
    if isinstance(block, ConvBlock):
        _scale_bias(block.depthwise, scale)
    if isinstance(block, ConvBlock | FeedForwardBlock):
        _multiply(block.channelwise[4], scale)
    elif isinstance(block, AttentionBlock):
        _multiply(block.attention.attn.out_proj, scale)
    elif isinstance(block, TimeBlock):
        for name in block.names:
            mapper = block.get_submodule(name)
            for parameter in ("weight", "bias"):
                rows = getattr(mapper, parameter).detach().clone()
                rows[len(rows) // 2 :] *= scale
                _replace(mapper, parameter, rows)


def _rescale_skips(trunk: Trunk, scales: Mapping[str, LevelScales]) -> None:
    """Divide the columns that read a skip by the s that the skip was stored with."""
    deepest = len(trunk.down_blocks) - 1
    for level in _levels(trunk):
        side, index = level.name.split(".")
        first = next((block for block in level.blocks if isinstance(block, ConvBlock)), None)
        if side != "up_blocks" or index == "0" or first is None:
            continue
        stored = scales[f"down_blocks.{deepest - int(index)}"].end
        if stored == 1:
            continue
        linear: Any = first.channelwise[0]
        weight = linear.weight.detach().clone()
        weight[:, first.depthwise.out_channels :] /= stored
        _replace(linear, "weight", weight)


def _rescale_norms(trunk: Trunk, levels: Sequence[Level], scales: Mapping[str, LevelScales]) -> None:
    """The epsilon of the norm at the end of every level, before a scaler or the exit."""
    for level, following in zip(levels, (*levels[1:], None), strict=True):
        norms = trunk.clf if following is None else following.entry
        end = scales[level.name].end
        for norm in norms.modules() if norms is not None and end != 1 else ():
            if isinstance(norm, ChannelNorm):
                norm.norm_eps = NORM_EPS * end * end


def _residual_scales(levels: Sequence[Level], scales: Mapping[str, LevelScales]) -> Iterator[float]:
    """s of the stream just before each ConvBlock, in running order: ControlNet residuals are added there."""
    for level in levels:
        own = scales[level.name]
        for _ in range(len(level.gaps) + 1):
            before = own.start
            for block, scale in zip(level.blocks, own.blocks, strict=True):
                if isinstance(block, ConvBlock):
                    yield before
                before = scale


def _scale_stream(factor: float, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * factor, *args[1:])


def _scale_residuals(
    scales: Sequence[float], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Residuals come as the sixth argument of Stage C, or by name."""
    place = 5
    residuals = args[place] if len(args) > place else kwargs.get("residuals")
    if residuals is None:
        return args, kwargs
    scaled = [None if r is None else r * s for r, s in zip(residuals, scales, strict=False)]
    if len(args) > place:
        return (*args[:place], scaled, *args[place + 1 :]), kwargs
    return args, {**kwargs, "residuals": scaled}


def _scale_bias(layer: Any, scale: float) -> None:
    _replace(layer, "bias", layer.bias * scale)


def _multiply(layer: Any, scale: float) -> None:
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            _replace(layer, name, parameter * scale)


def _replace(layer: Any, name: str, value: Tensor) -> None:
    """A new parameter in place of the old, which may be a view into a mapped file."""
    required = getattr(layer, name).requires_grad
    setattr(layer, name, nn.Parameter(value.detach(), requires_grad=required))
