"""The semantic encoder and the previewer, a pair: pixels -> `latents_c`, and back to a small picture.

The encoder is the feature stack of EfficientNetV2-S [Tan 2021, table 4] with a 1x1 convolution to 16 channels
and a batch norm without learned scale, so that with its stored statistics latents have about zero mean and
unit deviation per channel. The previewer is a plain stack of convolutions. Both run in eval mode except while
they are trained. Parameter names are the official ones; the backbone's are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

RGB_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, what the backbone was trained with
RGB_STD = (0.229, 0.224, 0.225)


class Stage(NamedTuple):
    """A run of like blocks; the first one changes stride and width."""

    kind: str  # "fused" (one dense convolution) or "mb" (expand, depthwise, squeeze, project)
    expand: int  # hidden width over input width
    kernel: int
    stride: int
    width: int  # output channels
    layers: int


@dataclass(frozen=True)
class SemanticConfig:
    stem: int = 24
    stages: tuple[Stage, ...] = (
        Stage("fused", 1, 3, 1, 24, 2),
        Stage("fused", 4, 3, 2, 48, 4),
        Stage("fused", 4, 3, 2, 64, 4),
        Stage("mb", 4, 3, 2, 128, 6),
        Stage("mb", 6, 3, 1, 160, 9),
        Stage("mb", 6, 3, 2, 256, 15),
    )
    features: int = 1280  # channels of the last backbone convolution
    latent_channels: int = 16
    stochastic_depth: float = 0.2  # drop probability of the last block while training, growing from 0

    def __post_init__(self) -> None:
        # Stages may come as plain lists, as they do from the JSON of a checkpoint.
        stages = tuple(Stage(*stage) for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        unknown = {stage.kind for stage in stages} - {"fused", "mb"}
        if unknown:
            raise ValueError(f'Unknown kind of stage {sorted(unknown)}: "fused" and "mb" are known.')

    @property
    def stride(self) -> int:
        """Pixels per latent: 32 in all sizes that fit the cascade."""
        stride = 2
        for stage in self.stages:
            stride *= stage.stride
        return stride


@dataclass(frozen=True)
class PreviewerConfig:
    latent_channels: int = 16
    width: int = 512
    out_channels: int = 3


def _conv_norm(
    before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU(inplace=True)) if act else nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Per-channel gates from the picture's mean [Hu 2018, eq. 3], SiLU in place of ReLU."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B,c,1,1)
        gate = self.fc2(nn.functional.silu(self.fc1(gate))).sigmoid()
        return x * gate


class ConvBlock(nn.Module):
    """A fused or MB block of EfficientNetV2, residual when it keeps size and width."""

    def __init__(self, stage: Stage, before: int, stride: int, drop: float) -> None:
        super().__init__()
        hidden = before * stage.expand
        layers: list[nn.Module] = []
        if stage.kind == "mb":
            if stage.expand > 1:
                layers.append(_conv_norm(before, hidden, 1))
            layers.append(_conv_norm(hidden, hidden, stage.kernel, stride, groups=hidden))
            layers.append(SqueezeExcite(hidden, max(1, before // 4)))
            layers.append(_conv_norm(hidden, stage.width, 1, act=False))
        elif stage.expand > 1:
            layers.append(_conv_norm(before, hidden, stage.kernel, stride))
            layers.append(_conv_norm(hidden, stage.width, 1, act=False))
        else:
            layers.append(_conv_norm(before, stage.width, stage.kernel, stride))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and before == stage.width
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        if not self.residual:
            return h
        if self.training and self.drop > 0:
            # Stochastic depth [Huang 2016]: whole branches of single samples are left out.
            keep = torch.empty(len(h), 1, 1, 1, dtype=h.dtype, device=h.device).bernoulli_(1 - self.drop)
            h = h * keep.div_(1 - self.drop)
        return h + x


def build_backbone(
    stem: int, stages: Sequence[Stage], features: int, stochastic_depth: float = 0.0
) -> nn.Sequential:
    """The feature stack: RGB -> (B,features,H/32,W/32). Stage by stage as torchvision numbers it."""
    layers: list[nn.Module] = [_conv_norm(3, stem, 3, stride=2)]
    width, block, blocks = stem, 0, sum(stage.layers for stage in stages)
    for stage in stages:
        run: list[nn.Module] = []
        for layer in range(stage.layers):
            drop = stochastic_depth * block / blocks
            run.append(ConvBlock(stage, width, stage.stride if layer == 0 else 1, drop))
            width, block = stage.width, block + 1
        layers.append(nn.Sequential(*run))
    return nn.Sequential(*layers, _conv_norm(width, features, 1))


class SemanticEncoder(nn.Module):
    """Pixels (B,3,H,W) in [0,1] -> latents_c (B,16,H/32,W/32); sides should be multiples of 32."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.stem, config.stages, config.features, config.stochastic_depth)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.features, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=False),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal by fan-out for convolutions [He 2015, eq. 14], zero biases, norms the identity."""
        for module in self.modules():
            # On the meta device a normal draw imports the whole of torch's compiler: seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [0,1], not normalised -> latents_c."""
        return self.encode_normalised(normalise(pixels).to(next(self.parameters()).dtype))

    def encode_normalised(self, x: Tensor) -> Tensor:
        """The bare network, for pictures that already went through `normalise`."""
        features = self.backbone(x.contiguous(memory_format=torch.channels_last))  # (B,1280,H/32,W/32)
        return self.mapper(features)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (B,3,H,W) in [0,1] with the backbone's mean and deviation taken out."""
    mean = torch.tensor(RGB_MEAN, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    std = torch.tensor(RGB_STD, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    return (pixels - mean) / std


class Previewer(nn.Module):
    """latents_c (B,16,h,w) -> a small picture (B,3,8h,8w), roughly in [0,1], not clamped."""

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        layers: list[nn.Module] = []
        before = config.latent_channels
        for width, kernel, up in (
            (w, 1, False), (w, 3, False),
            (w // 2, 2, True), (w // 2, 3, False),
            (w // 4, 2, True), (w // 4, 3, False),
            (w // 4, 2, True), (w // 4, 3, False),
        ):  # fmt: skip
            conv = (
                nn.ConvTranspose2d(before, width, kernel, stride=2)
                if up
                else nn.Conv2d(before, width, kernel, padding=kernel // 2)
            )
            layers += [conv, nn.GELU(), nn.BatchNorm2d(width)]  # the activation comes before the norm
            before = width
        layers.append(nn.Conv2d(before, config.out_channels, 1))
        self.blocks = nn.Sequential(*layers)

    def forward(self, latents_c: Tensor) -> Tensor:
        return self.blocks(latents_c.contiguous(memory_format=torch.channels_last))


SEMANTIC = {
    "full": SemanticConfig(),
    "mini": SemanticConfig(
        stem=16,
        stages=(
            Stage("fused", 2, 3, 2, 32, 1),
            Stage("fused", 4, 3, 2, 48, 1),
            Stage("mb", 4, 3, 2, 96, 2),
            Stage("mb", 4, 3, 2, 128, 3),
        ),
        features=384,
        stochastic_depth=0.0,
    ),
    "tiny": SemanticConfig(
        stem=8,
        stages=(
            Stage("fused", 1, 3, 1, 8, 1),
            Stage("fused", 2, 3, 2, 8, 1),
            Stage("fused", 2, 3, 2, 12, 1),
            Stage("mb", 2, 3, 2, 16, 2),
            Stage("mb", 2, 3, 2, 16, 1),
        ),
        features=32,
        stochastic_depth=0.0,
    ),
}
PREVIEWER = {
    "full": PreviewerConfig(),
    "mini": PreviewerConfig(width=128),
    "tiny": PreviewerConfig(width=16),
}
