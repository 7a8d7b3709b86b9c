"""Stage C: text and image embeddings -> `latents_c`, the tiny semantic latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.blocks import ChannelNorm, norm_last
from triptych.models.scratch import Scratch, keep, scratch_for, spread
from triptych.models.trunk import Trunk, TrunkConfig


@dataclass(frozen=True)
class StageCConfig(TrunkConfig):
    """The published 3.6B by default; see `TrunkConfig` for the shared fields."""

    channels: int = 16
    patch: int = 1
    widths: tuple[int, ...] = (2048, 2048)
    heads: tuple[int, ...] = (32, 32)
    patterns: tuple[str, ...] = ("CTA", "CTA")
    down_blocks: tuple[int, ...] = (8, 24)
    up_blocks: tuple[int, ...] = (24, 8)
    down_repeats: tuple[int, ...] = (1, 1)
    up_repeats: tuple[int, ...] = (1, 1)
    cond_width: int = 2048
    tokens_per_vector: int = 4
    text_width: int = 1280  # of the text tower's hidden states
    pooled_width: int = 1280
    image_width: int = 768
    time_size: int = 64
    extra_times: tuple[str, ...] = ("sca", "crp")
    kernel: int = 3
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attention: tuple[bool, ...] = (True, True)
    level_switch: tuple[bool, ...] = (False,)  # per gap between levels: halve the map there
    # Time blocks also see the pooled text. Not published: it costs a small network nearly nothing and tells
    # every position at once what is asked for.
    pooled_modulation: bool = False
    # Every position is told where it is. Not published: large networks find out from the borders.
    positions: bool = False
    # Hidden width of a guess of the latents from the pooled text alone, of which every position is told its
    # part. Not published: memory for what words look like, at a fiftieth of a small network's arithmetic.
    guess: int = 0


STAGE_C = {
    "3.6b": StageCConfig(),
    "1b": StageCConfig(
        widths=(1536, 1536), heads=(24, 24), cond_width=1536, down_blocks=(4, 12), up_blocks=(12, 4)
    ),
    "mini": StageCConfig(
        widths=(384, 384),
        heads=(6, 6),
        cond_width=384,
        down_blocks=(1, 2),
        up_blocks=(2, 1),
        tokens_per_vector=2,
        text_width=384,
        pooled_width=384,
        image_width=384,
        extra_times=(),
        dropout=(0.0, 0.0),
        pooled_modulation=True,
        positions=True,
        guess=1536,
    ),
    "tiny": StageCConfig(
        widths=(32, 32),
        heads=(2, 2),
        cond_width=32,
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        tokens_per_vector=2,
        text_width=384,
        pooled_width=384,
        image_width=384,
    ),
}


POSITION_WAVES = (0.25, 0.5, 1.0, 2.0)  # waves over a whole side


def embed_positions(x: Tensor) -> Tensor:
    """Where each position of a map (B, c, h, w) is: sines and cosines of its row and column, (h, w, 16).

    Counted from the middle in sides of the map, so that maps of all sizes have the same borders.
    """
    waves = torch.tensor(POSITION_WAVES, device=x.device) * (2 * math.pi)
    axes = []
    for side in x.shape[-2:]:
        places = (torch.arange(side, device=x.device) + 0.5) / side - 0.5
        angles = places[:, None] * waves
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1))  # (side, 8)
    rows, columns = axes
    height, width = len(rows), len(columns)
    both = [rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)]
    return torch.cat(both, dim=-1).to(x.dtype)


GUESS_SIDE = 8  # of the map that is guessed; maps of other sizes have it in their middle


class Guess(nn.Module):
    """What the latents look like, from the pooled text (B, pooled_width) alone: (B, channels, 8, 8).

    A perceptron that sees no noise and runs once a picture. Every output has weights of its own, so it
    remembers far more for its arithmetic than blocks that all positions share.
    """

    def __init__(self, config: StageCConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.layers = nn.Sequential(
            nn.Linear(config.pooled_width, config.guess), nn.GELU(),
            nn.LayerNorm(config.guess, elementwise_affine=False),
            nn.Linear(config.guess, config.guess), nn.GELU(),
            nn.LayerNorm(config.guess, elementwise_affine=False),
            nn.Linear(config.guess, config.channels * GUESS_SIDE**2),
        )  # fmt: skip

    def forward(self, text_pooled: Tensor) -> Tensor:
        guessed = self.layers(norm_last(text_pooled.flatten(1)))
        return guessed.view(-1, self.channels, GUESS_SIDE, GUESS_SIDE)


def at_size(guessed: Tensor, size: Sequence[int]) -> Tensor:
    """A guess (B, c, 8, 8) for maps of another size (h, w): as large as their shorter side, in the middle,
    and its border continued along the longer one, so that what is guessed keeps its form.

    Its latents are areas, whose corners do not align as those of `blocks.resize`.
    """
    height, width = size
    side = min(height, width)
    if side != guessed.shape[-1]:
        guessed = F.interpolate(guessed, (side, side), mode="bilinear")
    if height == width:
        return guessed
    left, top = (width - side) // 2, (height - side) // 2
    return F.pad(guessed, (left, width - side - left, top, height - side - top), mode="replicate")


class StageC(Trunk):
    """The text-conditional diffusion network on `latents_c`."""

    config: StageCConfig

    def __init__(self, config: StageCConfig) -> None:
        super().__init__(config)
        vector = config.cond_width * config.tokens_per_vector
        self.clip_txt_mapper = nn.Linear(config.text_width, config.cond_width)
        self.clip_txt_pooled_mapper = nn.Linear(config.pooled_width, vector)
        self.clip_img_mapper = nn.Linear(config.image_width, vector)
        if config.positions:
            self.position_mapper = nn.Linear(4 * len(POSITION_WAVES), config.widths[0])
        if config.guess:
            self.guess = Guess(config)
            self.guess_mapper = nn.Conv2d(config.channels, config.widths[0], 1)
        self.reset_parameters()
        if config.positions:
            nn.init.zeros_(self.position_mapper.weight)
        if config.guess:
            nn.init.zeros_(self.guess_mapper.weight)

    @property
    def pooled_modulation(self) -> int:
        return self.config.pooled_width if self.config.pooled_modulation else 0

    def condition_mappers(self) -> list[Any]:
        return [self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper]

    def down_scaler(self, level: int) -> nn.Module:
        return nn.Sequential(ChannelNorm(), LevelSwitch(self.config, level, up=False))

    def up_scaler(self, level: int) -> nn.Module:
        return nn.Sequential(ChannelNorm(), LevelSwitch(self.config, level, up=True))

    def embed_conditioning(
        self, text_hidden: Tensor, text_pooled: Tensor, image_embed: Tensor | None = None
    ) -> Tensor:
        """Condition tokens: text, then pooled text, then images.

        text_hidden (B, n, text_width), text_pooled (B, pooled_width) or (B, 1, pooled_width), image_embed
        (B, image_width) or (B, k, image_width), zeros if None.
        Returns (B, n + (1 + k) * tokens_per_vector, cond_width).
        """
        if image_embed is None:
            image_embed = text_pooled.new_zeros(text_pooled.shape[0], 1, self.config.image_width)
        tokens = [
            self.clip_txt_mapper(text_hidden),
            self.pooled_tokens(self.clip_txt_pooled_mapper, text_pooled),
            self.pooled_tokens(self.clip_img_mapper, image_embed),
        ]
        return norm_last(torch.cat(tokens, dim=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_hidden: Tensor,
        text_pooled: Tensor,
        image_embed: Tensor | None = None,
        residuals: Sequence[Tensor | None] | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """The prediction for x (B, 16, h, w) at times t (B,) in [0, 1]; for conditions see above.

        `residuals` is a list with gaps: entry k, (B, widths, h', w'), is added before ConvBlock k.
        `scratch` belongs to one run on these conditions. Conditions may have k times the rows of x and t,
        one branch of guidance after the other: the answer then has as many, and equal work is shared.
        """
        scratch = scratch_for(scratch)
        named = {"sca": sca, "crp": crp}
        extra = [named[name] for name in self.config.extra_times]
        time_vector = self.time_vectors(t, extra, text_pooled, x.dtype, scratch)  # (B, time_size * 3)
        tokens = keep(  #                                                      (B, 85, cond_width)
            scratch,
            "tokens",
            len(text_pooled),
            lambda: self.embed_conditioning(text_hidden, text_pooled, image_embed),
        )
        h = self.embedding(x.contiguous(memory_format=torch.channels_last))  # (B, widths[0], h, w)
        if self.config.positions:
            places = self.position_mapper(embed_positions(x))  #               (h, w, widths[0])
            h = h + places.permute(2, 0, 1)
        if self.config.guess:
            told = keep(
                scratch,
                "guess",
                len(text_pooled),
                lambda: self.guess_mapper(at_size(self.guess(text_pooled), x.shape[-2:])),
            )
            h = spread(h, len(told)) + told
        h = self.run(h, time_vector, tokens, residuals, scratch)  #            (B, widths[0], h, w)
        return self.clf(h)  #                                                  (B, 16, h, w)


class LevelSwitch(nn.Module):
    """1x1 convolution between levels; halves or doubles the map only where the level switch is on."""

    def __init__(self, config: StageCConfig, level: int, up: bool) -> None:
        super().__init__()
        outer, inner = config.widths[level - 1 : level + 1]
        scale = nn.Upsample(scale_factor=2.0 if up else 0.5, mode="bilinear", align_corners=True)
        resample = scale if config.level_switch[level - 1] else nn.Identity()
        mapping = nn.Conv2d(inner, outer, 1) if up else nn.Conv2d(outer, inner, 1)
        self.blocks = nn.ModuleList([resample, mapping] if up else [mapping, resample])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
