"""How alike two pictures are to the eye: LPIPS [Zhang 2018] and DISTS [Ding 2020] over AlexNet or VGG-16.

Both pass two pictures through the convolutions of an ImageNet network and compare what comes out on the way.
Parameter names are torchvision's (`features.N.weight`), whose published weights they take; the trained weight
of every channel comes beside them. Pixels are (B,3,H,W) in [0,1], distances (B,), 0 for equal pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.mobilenet import RGB_MEAN, RGB_STD

LPIPS_SHIFT = (-0.030, -0.088, -0.188)  # of pixels in [-1,1], [Zhang 2018, official scaling layer]
LPIPS_SCALE = (0.458, 0.448, 0.450)
LPIPS_EPS = 1e-10
DISTS_EPS = 1e-6  # c1 and c2 of [Ding 2020, eq. 3 and 4]
POOL_EPS = 1e-12


@dataclass(frozen=True)
class TrunkConfig:
    """Which network, and how wide each of its five stages is."""

    kind: str = "vgg"  # vgg (VGG-16) or alex (AlexNet)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)


ALEXNET = TrunkConfig("alex", (64, 192, 384, 256, 256))
VGG16 = TrunkConfig()
VGG_CONVOLUTIONS = (2, 2, 3, 3, 3)
ALEX_KERNELS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # size, stride, padding
ALEX_POOLED = (1, 2)  # stages that begin with a pooling


def trunk_config(shapes: Mapping[str, Sequence[int]]) -> TrunkConfig:
    """The network whose tensors have these shapes. Raises KeyError naming a tensor that is missing."""
    if shapes["features.0.weight"][-1] == ALEX_KERNELS[0][0]:
        return TrunkConfig("alex", tuple(shapes[f"features.{n}.weight"][0] for n in (0, 3, 6, 8, 10)))
    return TrunkConfig("vgg", tuple(shapes[f"features.{n}.weight"][0] for n in (0, 5, 10, 17, 24)))


class Trunk(nn.Module):
    """The convolutions of AlexNet or VGG-16 [Krizhevsky 2014, Simonyan 2015] and where their stages begin."""

    def __init__(self, config: TrunkConfig = VGG16) -> None:
        super().__init__()
        self.config = config
        stages = _alexnet(config.widths) if config.kind == "alex" else _vgg16(config.widths)
        self.features = nn.Sequential(*(layer for stage in stages for layer in stage))
        ends = [sum(map(len, stages[: number + 1])) for number in range(len(stages))]
        self.stages = tuple(zip((0, *ends), ends, strict=False))

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> list[Tensor]:
        """The last activation of every stage; `pool` replaces the poolings."""
        found = []
        for start, end in self.stages:
            for layer in list(self.features)[start:end]:
                x = pool(x) if pool is not None and isinstance(layer, nn.MaxPool2d) else layer(x)
            found.append(x)
        return found


def _vgg16(widths: Sequence[int]) -> list[list[nn.Module]]:
    stages: list[list[nn.Module]] = []
    inputs = 3
    for number, (width, convolutions) in enumerate(zip(widths, VGG_CONVOLUTIONS, strict=True)):
        stage: list[nn.Module] = [nn.MaxPool2d(2, 2)] if number else []
        for _ in range(convolutions):
            stage += [nn.Conv2d(inputs, width, 3, 1, 1), nn.ReLU()]
            inputs = width
        stages.append(stage)
    return stages


def _alexnet(widths: Sequence[int]) -> list[list[nn.Module]]:
    stages: list[list[nn.Module]] = []
    inputs = 3
    for number, (width, (size, stride, padding)) in enumerate(zip(widths, ALEX_KERNELS, strict=True)):
        stage: list[nn.Module] = [nn.MaxPool2d(3, 2)] if number in ALEX_POOLED else []
        stages.append([*stage, nn.Conv2d(inputs, width, size, stride, padding), nn.ReLU()])
        inputs = width
    return stages


class Lpips(nn.Module):
    """Squared differences of unit activations, weighted by channel, mean over places [Zhang 2018, eq. 1]."""

    def __init__(self, config: TrunkConfig = VGG16) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.weights = nn.ParameterDict({f"lin{n}": torch.ones(w) for n, w in enumerate(config.widths)})

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of pixels (B,3,H,W)."""
        pairs = zip(self._seen(a), self._seen(b), self.weights.values(), strict=True)
        stages = [((x - y).square() * w[:, None, None]).sum(1).mean((1, 2)) for x, y, w in pairs]
        return torch.stack(stages).sum(0)

    def _seen(self, pixels: Tensor) -> list[Tensor]:
        found = self.trunk(_scaled(2 * pixels - 1, LPIPS_SHIFT, LPIPS_SCALE))
        return [x / (x.square().sum(1, keepdim=True).sqrt() + LPIPS_EPS) for x in found]


class Dists(nn.Module):
    """Likeness of means (texture) and of structure, by channel of the picture and of VGG-16's stages."""

    def __init__(self, config: TrunkConfig = VGG16) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        channels = 3 + sum(config.widths)
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.ones(channels))
        self.pool = RootMeanPool()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of pixels (B,3,H,W) [Ding 2020, eq. 5]."""
        texture, structure = [], []
        for x, y in zip(self._seen(a), self._seen(b), strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            # The spread about the mean keeps what the mean of squares would lose to rounding.
            apart_x, apart_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
            covariance = (apart_x * apart_y).mean((2, 3))
            spread = apart_x.square().mean((2, 3)) + apart_y.square().mean((2, 3))
            texture.append(
                (2 * mean_x * mean_y + DISTS_EPS) / (mean_x.square() + mean_y.square() + DISTS_EPS)
            )
            structure.append((2 * covariance + DISTS_EPS) / (spread + DISTS_EPS))
        alike = torch.cat(texture, 1) @ self.alpha + torch.cat(structure, 1) @ self.beta
        return 1 - alike / (self.alpha.sum() + self.beta.sum())

    def _seen(self, pixels: Tensor) -> list[Tensor]:
        return [pixels, *self.trunk(_scaled(pixels, RGB_MEAN, RGB_STD), self.pool)]


class RootMeanPool(nn.Module):
    """Halves the sides by the root of a blurred square, without aliasing [Ding 2020, eq. 1]."""

    def forward(self, x: Tensor) -> Tensor:
        bell = x.new_tensor([0.25, 0.5, 0.25])
        kernel = (bell[:, None] * bell).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), kernel, None, 2, 1, 1, x.shape[1]) + POOL_EPS).sqrt()


def _scaled(x: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(deviation)[:, None, None]
