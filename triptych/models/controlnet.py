"""ControlNet: a hint -> residuals for chosen blocks of Stage C.

Not a copy of the network, as elsewhere [Zhang 2023], but a small encoder that turns a hint (a picture or map
of any number of channels) into one feature map, and a projection per chosen ConvBlock that turns it into what
is added before that block. It sees neither the time nor the text, so it runs once a picture. Parameter names
are the official ones; the list of blocks, which official files do not hold, is in the config.

Hints enter as they are, in [0,1]: no mean and deviation are taken out, not even for the EfficientNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from triptych.models.semantic import SEMANTIC, SemanticConfig, Stage, build_backbone

BOTTLENECKS = ("effnet", "simple", "large")
SLOPE = 0.2  # of the LeakyReLUs, below zero


@dataclass(frozen=True)
class ControlNetConfig:
    """The published canny ControlNet for the 3.6B by default."""

    channels: int = 1  # of the hint
    bottleneck: str = "effnet"  # the encoder: "effnet", "simple" or "large"
    blocks: tuple[int, ...] = (0, 4, 8, 12, 51, 55, 59, 63)  # ConvBlocks of Stage C in running order
    width: int = 2048  # channels of Stage C
    features: int = 1280  # channels of the encoder's map ("simple" keeps those of the hint)
    stem: int = 24  # "effnet": as in SemanticConfig
    stages: tuple[Stage, ...] = SemanticConfig.stages
    first_width: int = 16384  # "large": after the first convolution
    hidden: int = 1024  # "large": of its residual blocks
    residual_blocks: int = 8  # "large"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(Stage(*stage) for stage in self.stages))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.bottleneck not in BOTTLENECKS:
            raise ValueError(f'unknown bottleneck "{self.bottleneck}": {", ".join(BOTTLENECKS)} are known')
        if list(self.blocks) != sorted({block for block in self.blocks if block >= 0}) or not self.blocks:
            raise ValueError(f"blocks {list(self.blocks)[:9]} are not a rising list of block numbers")

    @property
    def encoded(self) -> int:
        """Channels of the encoder's feature map."""
        return self.channels if self.bottleneck == "simple" else self.features


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B,c,h,w), with learned scale and shift, unlike elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv3(gelu(norm(conv3(gelu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ChannelLayerNorm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            ChannelLayerNorm(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def _encoder(config: ControlNetConfig) -> nn.Sequential:
    c = config.channels
    if config.bottleneck == "effnet":
        encoder = build_backbone(config.stem, config.stages, config.features)
        if c != 3:
            # A new first convolution, without padding: official weights were trained so.
            stem: nn.Sequential = encoder[0]  # type: ignore[assignment]
            stem[0] = nn.Conv2d(c, config.stem, 3, stride=2, bias=False)
        return encoder
    if config.bottleneck == "simple":
        first = nn.Conv2d(c, 4 * c, 3, padding=1)
        return nn.Sequential(first, nn.LeakyReLU(SLOPE), nn.Conv2d(4 * c, c, 3, padding=1))
    layers: list[nn.Module] = [
        nn.Conv2d(c, config.first_width, 1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(config.first_width, config.hidden, 1),
    ]
    layers += [ResidualBlock(config.hidden) for _ in range(config.residual_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(config.hidden, config.features, 1))


class ControlNet(nn.Module):
    """Hint (B, channels, H, W) -> residuals for Stage C's `residuals`; a fresh one adds nothing."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        e = config.encoded
        self.backbone = _encoder(config)
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(e, e, 1, bias=False), nn.LeakyReLU(SLOPE), nn.Conv2d(e, config.width, 1, bias=False)
            )
            for _ in config.blocks
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Last projections zero, so that training starts from the undisturbed Stage C."""
        if next(self.parameters()).is_meta:
            return
        if self.config.bottleneck == "effnet":
            for module in self.backbone.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
        for projection in self.projections:
            nn.init.zeros_(projection[2].weight)  # type: ignore[index]

    def train(self, mode: bool = True) -> ControlNet:
        """As every module, but an EfficientNet stays in eval mode: its batch norms are never changed."""
        super().train(mode)
        if self.config.bottleneck == "effnet":
            self.backbone.eval()
        return self

    def encode(self, hint: Tensor) -> Tensor:
        """The feature map (B, encoded, h, w): H/32 x W/32 for "effnet", the hint's own size otherwise."""
        return self.backbone(hint.to(next(self.parameters()).dtype))

    def forward(self, hint: Tensor) -> list[Tensor | None]:
        """Entry k, (B, width, h, w), belongs before ConvBlock k of Stage C; None where nothing is added."""
        features = self.encode(hint)
        residuals: list[Tensor | None] = [None] * (self.config.blocks[-1] + 1)
        for block, projection in zip(self.config.blocks, self.projections, strict=True):
            residuals[block] = projection(features)
        return residuals

    @torch.no_grad()
    def start_from(self, backbone: Mapping[str, Tensor]) -> bool:
        """Begin with a picture encoder's `backbone.*` weights, such as the semantic encoder's.

        The first convolution becomes one for `channels` as published: fewer than 3 take the first slices of
        the RGB one, more leave the further ones zero. Returns False, changing nothing, where shapes differ.
        """
        own = self.backbone.state_dict()
        wanted = {name: backbone.get(f"backbone.{name}") for name in own}
        first = "0.0.weight"
        rgb = wanted[first] if self.config.bottleneck == "effnet" else None
        if rgb is None or rgb.shape != (self.config.stem, 3, 3, 3):
            return False
        stem = torch.zeros_like(own[first])
        shared = min(3, self.config.channels)
        stem[:, :shared] = rgb[:, :shared].to(stem)
        wanted[first] = stem
        if any(tensor is None or tensor.shape != own[name].shape for name, tensor in wanted.items()):
            return False
        self.backbone.load_state_dict(wanted)
        return True


# The published files, by the hint they were trained on.
PUBLISHED_CONTROLNETS = {
    "canny": ControlNetConfig(),
    "inpainting": ControlNetConfig(channels=4),
    "super_resolution": ControlNetConfig(channels=16, bottleneck="large"),
    "identity": ControlNetConfig(channels=512, bottleneck="simple", blocks=tuple(range(64))),
}
PUBLISHED_BLOCKS = ControlNetConfig.blocks


def _small(size: str, width: int, blocks: int, first: int, hidden: int, deep: int) -> ControlNetConfig:
    encoder = SEMANTIC[size]
    return ControlNetConfig(
        blocks=tuple(range(blocks)),
        width=width,
        features=encoder.features,
        stem=encoder.stem,
        stages=encoder.stages,
        first_width=first,
        hidden=hidden,
        residual_blocks=deep,
    )


# By the size of the Stage C they steer; `channels` and `bottleneck` follow from the kind of hint.
CONTROLNET = {
    "3.6b": ControlNetConfig(),
    "1b": replace(ControlNetConfig(), width=1536, blocks=(0, 2, 4, 6, 25, 27, 29, 31)),
    "mini": _small("mini", width=384, blocks=6, first=512, hidden=192, deep=2),
    "tiny": _small("tiny", width=32, blocks=4, first=32, hidden=16, deep=1),
}
