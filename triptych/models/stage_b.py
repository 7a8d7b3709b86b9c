"""Stage B: semantic latents and pooled text -> `latents_b`, the latents that Stage A decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.models.blocks import ChannelNorm, norm_last, resize
from triptych.models.scratch import Scratch, keep, scratch_for, spread
from triptych.models.trunk import Trunk, TrunkConfig


@dataclass(frozen=True)
class StageBConfig(TrunkConfig):
    """The published 1.5B by default (its authors call it "3B"); see `TrunkConfig` for the shared fields."""

    channels: int = 4
    patch: int = 2
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (0, 0, 20, 20)
    patterns: tuple[str, ...] = ("CT", "CT", "CTA", "CTA")
    down_blocks: tuple[int, ...] = (2, 6, 28, 6)
    up_blocks: tuple[int, ...] = (6, 28, 6, 2)
    down_repeats: tuple[int, ...] = (1, 1, 1, 1)
    up_repeats: tuple[int, ...] = (3, 3, 2, 2)
    cond_width: int = 1280
    tokens_per_vector: int = 4
    pooled_width: int = 1280
    semantic_channels: int = 16  # channels of latents_c
    pixel_channels: int = 3  # of the optional pixel input
    time_size: int = 64
    extra_times: tuple[str, ...] = ("sca",)
    kernel: int = 3
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    self_attention: tuple[bool, ...] = (True, True, True, True)
    # Each semantic latent is also unfolded into this many positions a side by a small decoder of its own. Not
    # published: large networks read the place inside a latent from its neighbours, small ones hardly can.
    semantic_unfold: int = 0


STAGE_B = {
    "1.5b": StageBConfig(),
    "700m": StageBConfig(
        widths=(320, 576, 1152, 1152),
        heads=(0, 9, 18, 18),
        down_blocks=(2, 4, 14, 4),
        up_blocks=(4, 14, 4, 2),
        up_repeats=(2, 2, 2, 2),
    ),
    "mini": StageBConfig(
        widths=(48, 96, 192),
        heads=(0, 0, 3),
        patterns=("CT", "CT", "CTA"),
        down_blocks=(1, 1, 2),
        up_blocks=(2, 1, 1),
        down_repeats=(1, 1, 1),
        up_repeats=(1, 1, 1),
        cond_width=192,
        tokens_per_vector=2,
        pooled_width=384,
        extra_times=(),
        dropout=(0.0, 0.0, 0.0),
        self_attention=(True, True, True),
        semantic_unfold=4,
    ),
    "tiny": StageBConfig(
        widths=(16, 32),
        heads=(0, 2),
        patterns=("CT", "CTA"),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        down_repeats=(1, 1),
        up_repeats=(2, 1),
        cond_width=32,
        tokens_per_vector=2,
        pooled_width=384,
        dropout=(0.0, 0.0),
        self_attention=(True, True),
    ),
}


class StageB(Trunk):
    """The diffusion network on `latents_b`, steered by `latents_c`."""

    config: StageBConfig

    def __init__(self, config: StageBConfig) -> None:
        super().__init__(config)
        self.effnet_mapper = map_mapper(config.semantic_channels, config.widths[0])
        self.pixels_mapper = map_mapper(config.pixel_channels, config.widths[0])
        self.clip_mapper = nn.Linear(config.pooled_width, config.cond_width * config.tokens_per_vector)
        if config.semantic_unfold:
            self.semantic_unfold = unfolder(
                config.semantic_channels, config.widths[0], config.semantic_unfold
            )
        self.reset_parameters()
        if config.semantic_unfold:
            last: Any = self.semantic_unfold[2]
            nn.init.zeros_(last.weight)

    def condition_mappers(self) -> list[Any]:
        convs = [mapper[index] for mapper in (self.effnet_mapper, self.pixels_mapper) for index in (0, 2)]
        return [self.clip_mapper, *convs]

    def embed_conditioning(self, text_pooled: Tensor) -> Tensor:
        """Pooled text (B, pooled_width) or (B, n, pooled_width) -> (B, n * tokens_per_vector, cond_width)."""
        return norm_last(self.pooled_tokens(self.clip_mapper, text_pooled))

    def embed_inputs(self, x: Tensor, semantic: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Entry of x plus the mapped semantic latents and pixels (B, widths[0], H / patch, W / patch).

        Semantic latents are resized, then mapped; pixels are mapped, then resized. Without pixels a zero
        picture stands in: its mapped value is a learned constant, not zero.
        """
        return self.embedding(x.contiguous(memory_format=torch.channels_last)) + self.map_inputs(
            x, semantic, pixels
        )

    def map_inputs(self, x: Tensor, semantic: Tensor, pixels: Tensor | None) -> Tensor:
        """What is added to the entry of x; it does not depend on the step, only on the size of x."""
        size = (x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch)
        mapped: Tensor = self.effnet_mapper(resize(semantic, size))
        if self.config.semantic_unfold:
            mapped = mapped + resize(self.semantic_unfold(semantic), size)
        if pixels is None:
            pixels = x.new_zeros(1, self.config.pixel_channels, 8, 8)
        return mapped + resize(self.pixels_mapper(pixels), size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        semantic: Tensor,
        text_pooled: Tensor,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """The prediction for x (B, 4, H, W), H and W even, at times t (B,) in [0, 1].

        semantic (B, 16, h, w) of any size, zeros where unconditional. pixels (B, 3, h', w') in [0, 1].
        `scratch` and conditions with more rows than x: see `StageC.forward`.
        """
        scratch, rows = scratch_for(scratch), len(text_pooled)
        extra = [{"sca": sca}[name] for name in self.config.extra_times]
        time_vector = self.time_vectors(t, extra, text_pooled, x.dtype, scratch)  # (B, time_size * 2)
        tokens = keep(scratch, "tokens", rows, lambda: self.embed_conditioning(text_pooled))
        inputs = keep(scratch, "inputs", rows, lambda: self.map_inputs(x, semantic, pixels))
        h = (
            spread(self.embedding(x.contiguous(memory_format=torch.channels_last)), rows) + inputs
        )  # (B, widths[0], H/2, W/2)
        h = self.run(h, time_vector, tokens, None, scratch)  #                (B, widths[0], H/2, W/2)
        return self.clf(h)  #                                                 (B, 4, H, W)


def unfolder(channels: int, width: int, factor: int) -> nn.Sequential:
    """A map (B, channels, h, w) -> (B, width, factor * h, factor * w)."""
    return nn.Sequential(
        nn.Conv2d(channels, 8 * width, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8 * width, width * factor**2, 1),
        nn.PixelShuffle(factor),
    )


def map_mapper(channels: int, width: int) -> nn.Sequential:
    """1x1 perceptron that lifts a map of `channels` to the trunk's width."""
    return nn.Sequential(
        nn.Conv2d(channels, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1), ChannelNorm()
    )
