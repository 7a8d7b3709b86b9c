"""A small image tower for the small cascade: pictures into the space of MiniLM's sentence vectors.

Plain residual blocks [He 2016, pre-activation form] with group norm: on CPUs full 3x3 convolutions train
about three times as fast as depthwise blocks with as many parameters, and group norm keeps the pictures of a
batch independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels per side of the patches that the first layer cuts
GROUPS = 8


@dataclass(frozen=True)
class ImageTowerConfig:
    side: int = 128  # pixels per side that the network looks at
    widths: tuple[int, ...] = (32, 64, 128, 256)  # channels per stage, each at half the resolution before it
    blocks: tuple[int, ...] = (1, 1, 2, 1)  # residual blocks per stage
    width: int = 384  # of the embedding: that of the text tower's pooled vector
    place_width: int = 0  # channels of the last map that reach the embedding place by place; 0: only pooled


class Block(nn.Module):
    """Norm, 3x3, SiLU, 3x3, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.enter = nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(F.silu(self.enter(self.norm(x))))


class ImageTower(nn.Module):
    """Squares of pixels to unit vectors."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        before = 3
        for width, blocks in zip(config.widths, config.blocks, strict=True):
            step = 2 if stages else PATCH
            enter = nn.Conv2d(before, width, step, stride=step)
            stages.append(nn.Sequential(enter, *(Block(width) for _ in range(blocks))))
            before = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(2 * before)
        self.project = nn.Linear(2 * before, config.width)
        if config.place_width:
            last = config.side // (PATCH * 2 ** (len(config.widths) - 1))
            self.narrow = nn.Conv2d(before, config.place_width, 1)
            self.places = nn.Linear(config.place_width * last**2, config.width)
        self.reset_parameters()
        if config.place_width:
            nn.init.zeros_(self.places.weight)

    def reset_parameters(self) -> None:
        """Variance-keeping truncated normals; blocks start as a small addition to their input."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.trunc_normal_(module.leave.weight, std=0.3 * module.leave.weight[0].numel() ** -0.5)

    @property
    def side(self) -> int:
        """Pixels per side that the network looks at."""
        return self.config.side

    @property
    def width(self) -> int:
        """Width of the embedding."""
        return self.config.width

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, width) of length 1 of squares (B, 3, side, side) in [0, 1]."""
        x = (pixels * 2 - 1).to(self.project.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stages(x)  # (B, C, side / 32, side / 32) with four stages
        # The mean knows how much there is of something, the maximum whether there is any: small objects.
        embed = self.project(self.norm(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)))
        if self.config.place_width:
            embed = embed + self.places(F.silu(self.narrow(x)).flatten(1))  # what is where
        return F.normalize(embed, dim=-1)


IMAGE_TOWER = {
    "mini": ImageTowerConfig(place_width=64),
    "tiny": ImageTowerConfig(side=32, widths=(8, 16), blocks=(1, 1), width=32),
}
