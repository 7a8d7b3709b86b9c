"""MobileNetV2 [Sandler 2018, table 2], for judging pictures, and the head that names icons on top of it.

`MobileNetV2` gives the features of the ImageNet network; parameter names are torchvision's, whose published
weights it takes. `IconJudge` keeps that network as it is (so its features also serve as a distance between
sets of pictures) and adds a small trained head. Neither takes part in making pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RGB_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, what the weights were trained with
RGB_STD = (0.229, 0.224, 0.225)
STAGES = (  # expansion, channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FEATURES = 1280
MIDDLE = 13  # `features` up to here end at stride 16 with 96 channels
MIDDLE_CHANNELS = 96


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [_conv(inputs, hidden, 1)]
        layers += [
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """The feature stack: pixels (B,3,H,W) in [0,1], not normalised -> maps
    (B,1280,ceil(H/32),ceil(W/32))."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        width = 32
        for expand, channels, blocks, stride in STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(width, channels, stride if block == 0 else 1, expand))
                width = channels
        layers.append(_conv(width, FEATURES, 1))
        self.features = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.maps(pixels)[1]

    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The maps at stride 16 (B,96,...) and the last ones at stride 32 (B,1280,...)."""
        mean = torch.tensor(RGB_MEAN, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        std = torch.tensor(RGB_STD, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        middle = self.features[: MIDDLE + 1]((pixels - mean) / std)
        return middle, self.features[MIDDLE + 1 :](middle)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The features a distance is measured in (B,1280): the last maps, averaged."""
        return self.maps(pixels)[1].mean((2, 3))


@dataclass(frozen=True)
class IconJudgeConfig:
    classes: int = 100
    side: int = 128  # pictures are brought to side x side


class IconJudge(nn.Module):
    """Which of a list of concepts a picture shows: one linear layer on pooled maps of `MobileNetV2`."""

    def __init__(self, config: IconJudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MobileNetV2()
        self.head = nn.Linear(2 * FEATURES + 5 * MIDDLE_CHANNELS, config.classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B,3,H,W) in [0,1], any size -> scores (B,classes), the logits of a softmax."""
        scores: Tensor = self.head(self.describe(pixels))
        return scores

    def describe(self, pixels: Tensor) -> Tensor:
        """What the head sees (B,3040): both maps averaged, the last one's maxima, the middle one in
        quarters."""
        side = (self.config.side, self.config.side)
        if pixels.shape[2:] != side:
            pixels = F.interpolate(pixels, side, mode="bilinear", antialias=True)
        middle, last = self.backbone.maps(pixels)
        quarters = F.adaptive_avg_pool2d(middle, 2).flatten(1)
        return torch.cat([last.mean((2, 3)), last.amax((2, 3)), middle.mean((2, 3)), quarters], dim=1)
