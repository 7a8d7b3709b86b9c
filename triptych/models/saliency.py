"""Where the eye goes first: the small network whose map becomes an automatic mask for inpainting.

Parameter names are those of the published file. Every convolution is padded by reflection; norms are
instance norms with learned scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

SHORT_SIDE = 240  # pixels the picture is brought to


@dataclass(frozen=True)
class SaliencyConfig:
    """The published network; it has one size only."""

    widths: tuple[int, ...] = (8, 16, 32, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(before, after, kernel, stride)]


def _normed(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [*_conv(before, after, kernel, stride), nn.InstanceNorm2d(after, affine=True), nn.ReLU()]


class ResidualBlock(nn.Module):
    """x + norm(conv3(relu(norm(conv3(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = [*_conv(width, width, 3), nn.InstanceNorm2d(width, affine=True)]
        self.resblock = nn.Sequential(*_normed(width, width, 3), *last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.resblock(x)


class Saliency(nn.Module):
    """Pixels (B,3,H,W) in [0,1] -> map (B,1,h,w) in [0,1], an eighth of the picture at SHORT_SIDE."""

    def __init__(self, config: SaliencyConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, wide = config.widths
        self.downsampler = nn.Sequential(
            *_normed(3, first, 9, 4), *_normed(first, second, 3, 2), *_normed(second, third, 3, 2)
        )
        widen = nn.Conv2d(third, wide, 1, groups=third, bias=False)
        self.residual = nn.Sequential(ResidualBlock(third), widen, ResidualBlock(wide))
        self.segmentator = nn.Sequential(
            *_normed(wide, second, 3), nn.Upsample(scale_factor=2), *_conv(second, 1, 9), nn.Sigmoid()
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = shrink(pixels).to(next(self.parameters()).dtype)
        return self.segmentator(self.residual(self.downsampler(x)))


def shrink(pixels: Tensor) -> Tensor:
    """Pixels with their shorter side SHORT_SIDE long, the other in proportion, truncated."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = (int(SHORT_SIDE * height / short), int(SHORT_SIDE * width / short))
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)
