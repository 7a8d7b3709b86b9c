"""The tower shared by Stages B and C: levels of blocks on the way down, the same with skips on the way up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.models.blocks import (
    AttentionBlock,
    ChannelNorm,
    ConvBlock,
    FeedForwardBlock,
    GlobalResponseNorm,
    TimeBlock,
    embed_time,
    resize,
)
from triptych.models.scratch import Scratch, spread


@dataclass(frozen=True)
class TrunkConfig:
    """What Stages B and C have in common. Lists go by level, outermost first; `up_*` deepest first."""

    channels: int  # of the latents, in and out
    patch: int  # pixel-unshuffle at the entry
    widths: tuple[int, ...]  # channels of each level
    heads: tuple[int, ...]  # attention heads of each level, 0 where the pattern has no A
    patterns: tuple[str, ...]  # blocks of one pass: C conv, T time, A attention, F feed-forward
    down_blocks: tuple[int, ...]  # how often the pattern stands on each level, going down
    up_blocks: tuple[int, ...]  # going up, deepest level first
    down_repeats: tuple[int, ...]  # passes over the same blocks
    up_repeats: tuple[int, ...]  # deepest level first
    cond_width: int  # width of the condition tokens
    tokens_per_vector: int  # tokens made from one pooled text or image vector
    pooled_width: int  # width of the pooled text embedding
    time_size: int
    extra_times: tuple[str, ...]  # further scalar inputs, embedded like the time
    kernel: int
    dropout: tuple[float, ...]  # per level
    self_attention: tuple[bool, ...]  # per level: do positions attend to each other

    def __post_init__(self) -> None:
        # Settings read from JSON or TOML come as lists; tuples keep the config hashable and frozen.
        for name, value in list(vars(self).items()):
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        levels = len(self.widths)
        per_level = ("heads", "patterns", "down_blocks", "up_blocks", "down_repeats", "up_repeats")
        for name in (*per_level, "dropout", "self_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, widths has {levels}: one per level."
                )

    @property
    def conv_blocks(self) -> int:
        """ConvBlocks met in one run, down and up, counting every pass: what ControlNets number."""
        return self.conv_blocks_before(len(self.widths)) + self.conv_blocks_below(-1)

    def conv_blocks_before(self, level: int) -> int:
        """ConvBlocks met on the way down before `level`, counting every pass."""
        down = zip(self.patterns, self.down_blocks, self.down_repeats, strict=True)
        return sum(pattern.count("C") * blocks * repeats for pattern, blocks, repeats in (*down,)[:level])

    def conv_blocks_below(self, level: int) -> int:
        """ConvBlocks met on the way up before `level`, counting every pass."""
        up = zip(self.patterns[::-1], self.up_blocks, self.up_repeats, strict=True)
        first = len(self.widths) - 1 - level
        return sum(pattern.count("C") * blocks * repeats for pattern, blocks, repeats in (*up,)[:first])

    @property
    def deep(self) -> int:
        """The outermost of the levels that neighbouring steps may share: the lower half of them, with 75 % of
        the arithmetic of the published Stages C and 77 % of the 700M's."""
        return len(self.widths) // 2


class Trunk(nn.Module):
    """Entry, tower and exit. Stages B and C add their inputs and condition tokens.

    `down_scaler(level)` and `up_scaler(level)` give the modules between level - 1 and level.
    """

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        patched = config.channels * config.patch**2
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch), nn.Conv2d(patched, config.widths[0], 1), ChannelNorm()
        )
        self.clf = nn.Sequential(
            ChannelNorm(), nn.Conv2d(config.widths[0], patched, 1), nn.PixelShuffle(config.patch)
        )
        levels = range(len(config.widths))
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.down_downscalers, self.up_upscalers = nn.ModuleList(), nn.ModuleList()
        self.down_repeat_mappers, self.up_repeat_mappers = nn.ModuleList(), nn.ModuleList()
        for level in levels:
            self.down_downscalers.append(self.down_scaler(level) if level else nn.Identity())
            self.down_blocks.append(self.build_level(level, config.down_blocks[level], skip=False))
            self.down_repeat_mappers.append(self.build_gaps(level, config.down_repeats[level]))
        for up, level in enumerate(reversed(levels)):
            self.up_blocks.append(self.build_level(level, config.up_blocks[up], skip=up > 0))
            self.up_repeat_mappers.append(self.build_gaps(level, config.up_repeats[up]))
            self.up_upscalers.append(self.up_scaler(level) if level else nn.Identity())

    @property
    def pooled_modulation(self) -> int:
        """Length of the pooled text that time blocks see; 0 in all published networks."""
        return 0

    def down_scaler(self, level: int) -> nn.Module:
        """From level - 1 down to level: halves the map by a strided convolution."""
        outer, inner = self.config.widths[level - 1 : level + 1]
        return nn.Sequential(ChannelNorm(), nn.Conv2d(outer, inner, 2, stride=2))

    def up_scaler(self, level: int) -> nn.Module:
        """From level up to level - 1: doubles the map by a transposed convolution."""
        outer, inner = self.config.widths[level - 1 : level + 1]
        return nn.Sequential(ChannelNorm(), nn.ConvTranspose2d(inner, outer, 2, stride=2))

    def build_level(self, level: int, count: int, skip: bool) -> nn.ModuleList:
        pattern = self.config.patterns[level]
        first = pattern.find("C")
        blocks = [
            self.build_block(kind, level, skip and index == first)
            for index, kind in enumerate(pattern * count)
        ]
        return nn.ModuleList(blocks)

    def build_block(self, kind: str, level: int, skip: bool) -> nn.Module:
        config = self.config
        width, dropout = config.widths[level], config.dropout[level]
        if kind == "C":
            return ConvBlock(width, width if skip else 0, config.kernel, dropout)
        if kind == "T":
            return TimeBlock(width, config.time_size, config.extra_times, self.pooled_modulation)
        if kind == "A":
            heads, self_attention = config.heads[level], config.self_attention[level]
            return AttentionBlock(width, config.cond_width, heads, self_attention, dropout)
        if kind == "F":
            return FeedForwardBlock(width, dropout)
        raise ValueError(
            f'unknown block "{kind}" in pattern "{config.patterns[level]}": C, T, A and F are known.'
        )

    def build_gaps(self, level: int, repeats: int) -> nn.ModuleList:
        width = self.config.widths[level]
        return nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(repeats - 1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights as the official code draws them; a fresh network outputs exactly zero."""
        entry: Any = self.embedding[1]
        leave: Any = self.clf[1]
        if entry.weight.is_meta:  # weights follow from a file; a normal draw on the meta device
            return  #              would import torch's whole compiler, which takes seconds
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.condition_mappers():
            nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(entry.weight, gain=0.02)
        nn.init.zeros_(leave.weight)
        depth_scale = math.sqrt(1 / sum(self.config.down_blocks))
        for module in self.modules():
            if isinstance(module, ConvBlock | FeedForwardBlock):
                last: Any = module.channelwise[4]
                last.weight.mul_(depth_scale)
            elif isinstance(module, GlobalResponseNorm):
                nn.init.zeros_(module.gamma)
                nn.init.zeros_(module.beta)
            elif isinstance(module, TimeBlock):
                for name in module.names:
                    mapper: Any = module.get_submodule(name)
                    nn.init.zeros_(mapper.weight)

    def condition_mappers(self) -> list[Any]:
        """The layers that read conditions, born small."""
        raise NotImplementedError

    def time_vector(self, t: Tensor, extra: Sequence[Tensor | None]) -> Tensor:
        """t (B,) in [0, 1] and the extra scalars -> (B, time_size * (1 + extras)), float32.

        Extras that are None are 0, whose embedding is not zero: they are always computed.
        """
        scalars = [t, *(torch.zeros_like(t) if value is None else value for value in extra)]
        return torch.cat([embed_time(scalar, self.config.time_size) for scalar in scalars], dim=1)

    def time_vectors(
        self,
        t: Tensor,
        extra: Sequence[Tensor | None],
        text_pooled: Tensor,
        dtype: torch.dtype,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """What time blocks are told: (B, sum of sizes), or (steps, 1 or B, sum of sizes) for all steps, where
        the scratch knows which one it is. B is that of the pooled text where time blocks see it."""
        pooled = None
        if self.pooled_modulation:
            pooled = (text_pooled.flatten(1) * self.pooled_modulation**0.5).to(dtype)  # unit deviation

        def of_all_steps(times: Tensor) -> Tensor:
            vectors = self.time_vector(times, extra).to(dtype)[:, None]
            if pooled is None:
                return vectors
            wide = vectors.expand(-1, len(pooled), -1), pooled.expand(len(times), -1, -1)
            return torch.cat(wide, dim=-1)

        if scratch is not None and scratch.row is not None and all(value is None for value in extra):
            times = torch.tensor(scratch.times, device=t.device)
            return scratch.keep("times", len(text_pooled), lambda: of_all_steps(times))
        vectors = self.time_vector(t, extra).to(dtype)
        return vectors if pooled is None else torch.cat([spread(vectors, len(pooled)), pooled], dim=1)

    def pooled_tokens(self, mapper: nn.Module, vectors: Tensor) -> Tensor:
        """(B, width) or (B, n, width) -> (B, n * tokens_per_vector, cond_width)."""
        if vectors.ndim == 2:
            vectors = vectors[:, None]
        mapped = mapper(vectors)
        return mapped.reshape(mapped.shape[0], -1, self.config.cond_width)

    def run(
        self,
        x: Tensor,
        time_vector: Tensor,
        tokens: Tensor,
        residuals: Sequence[Tensor | None] | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """The tower, from the entry's output to the exit's input, both (B, widths[0], h, w).

        tokens (B or a multiple of B, m, cond_width): with more tokens than maps, branches of guidance share
        the way until the first tokens enter, and what comes out has a map for every set of tokens.
        """
        shallow, deep = range(self.config.deep), range(self.config.deep, len(self.config.widths))
        given = (time_vector, tokens, residuals, scratch)
        outputs = self.run_down(x, *given, shallow)
        if outputs:
            x = outputs[-1]

        def from_deep() -> Tensor:
            below = self.run_down(x, *given, deep)
            return self.run_up(below[-1], below, *given, deep)

        back = from_deep() if scratch is None else scratch.deep(from_deep)
        return spread(self.run_up(back, outputs, *given, shallow), len(tokens))

    def run_down(
        self,
        x: Tensor,
        time_vector: Tensor,
        tokens: Tensor,
        residuals: Sequence[Tensor | None] | None,
        scratch: Scratch | None,
        levels: range,
    ) -> list[Tensor]:
        """Outputs of `levels` on the way down, outermost first; x is from the level above, or the entry."""
        outputs = []
        conv_index = self.config.conv_blocks_before(levels.start)
        for level in levels:
            x = self.down_downscalers[level](x)
            blocks, gaps = self.down_blocks[level], self.down_repeat_mappers[level]
            x, conv_index = run_level(
                x, blocks, gaps, time_vector, tokens, residuals, conv_index, None, scratch
            )
            outputs.append(x)
        return outputs

    def run_up(
        self,
        x: Tensor,
        outputs: Sequence[Tensor],
        time_vector: Tensor,
        tokens: Tensor,
        residuals: Sequence[Tensor | None] | None,
        scratch: Scratch | None,
        levels: range,
    ) -> Tensor:
        """From the deepest of `levels` up to its outermost one and out of it; `outputs` are theirs on the way
        down, and the deepest level of all has none of them as its skip."""
        deepest = len(self.config.widths) - 1
        conv_index = self.num_down_conv_blocks + self.config.conv_blocks_below(levels.stop - 1)
        for level in reversed(levels):
            up = deepest - level
            skip = outputs[level - levels.start] if up else None
            blocks, gaps = self.up_blocks[up], self.up_repeat_mappers[up]
            x, conv_index = run_level(
                x, blocks, gaps, time_vector, tokens, residuals, conv_index, skip, scratch
            )
            x = self.up_upscalers[up](x)
        return x

    @property
    def num_down_conv_blocks(self) -> int:
        """ConvBlocks run on the way down, counting every pass; ControlNet residuals are numbered so."""
        return self.config.conv_blocks_before(len(self.config.widths))


def run_level(
    x: Tensor,
    blocks: Any,
    gaps: Any,
    time_vector: Tensor,
    tokens: Tensor,
    residuals: Sequence[Tensor | None] | None,
    conv_index: int,
    skip: Tensor | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, int]:
    """All passes over one level. Returns the map and the number of ConvBlocks met so far.

    `skip` goes to the first ConvBlock in every pass; where sizes differ, which odd maps cause, x is resized
    to the skip, not the other way round. `residuals[k]`, if any, is added before ConvBlock k runs.
    """
    if scratch is not None and scratch.fused:
        x = x.clone()  # the blocks overwrite it, and it may be a skip or the caller's
    for gap in (*gaps, None):
        skip_due = skip
        for block in blocks:
            if isinstance(block, ConvBlock):
                if skip_due is not None:
                    x = spread(resize(x, skip_due.shape[-2:]), len(skip_due))
                    skip_due = spread(skip_due, len(x))
                residual = residuals[conv_index] if residuals and conv_index < len(residuals) else None
                if residual is not None:
                    x = x + spread(resize(residual, x.shape[-2:]).to(x.dtype), len(x))
                x = block(x, skip_due, scratch)
                skip_due = None
                conv_index += 1
            elif isinstance(block, AttentionBlock):
                x = block(x, tokens, scratch)
            elif isinstance(block, TimeBlock):
                x = block(x, time_vector, scratch)
            else:
                x = block(x, scratch)
        if gap is not None:
            x = gap(x)
    return x, conv_index
