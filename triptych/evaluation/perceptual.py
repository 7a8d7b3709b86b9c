"""LPIPS and DISTS by name, for pictures beside their originals.

The trained weight of every channel is in the package; the ImageNet network beneath (AlexNet or VGG-16, in
torchvision's layout) is the user's, see `judge_weights`. The number of LPIPS depends on the network: its name
says which ("lpips alex" or "lpips vgg").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from triptych.checkpoints.files import read_tensors
from triptych.errors import CheckpointError, nearest
from triptych.evaluation.judge_weights import find_judge, read_weights, take
from triptych.models.perceptual import Dists, Lpips, TrunkConfig, trunk_config

PERCEPTUAL = ("lpips", "dists")


@dataclass(frozen=True)
class Distance:
    """Pixels (B,3,H,W) in [0,1] of pictures and of their originals -> (B,)."""

    name: str
    of: Callable[[Tensor, Tensor], Tensor]


def open_distances(names: Sequence[str], weights: Path | None) -> list[Distance]:
    """The distances of these names. Raises CheckpointError that says how to get what is missing."""
    for name in names:
        if name not in PERCEPTUAL:
            raise CheckpointError(f'There is no distance "{name}" of pictures: {nearest(name, PERCEPTUAL)}.')
    found = [(find_judge(name, weights), name) for name in names]
    return [
        _open(judge.file("alex*.*|vgg*.*" if name == "lpips" else "vgg*.*"), name) for judge, name in found
    ]


def _open(path: Path, name: str) -> Distance:
    tensors = {f"trunk.{key}": value for key, value in read_weights(path).items()}
    shapes = {key.removeprefix("trunk."): tuple(value.shape) for key, value in tensors.items()}
    try:
        config = trunk_config(shapes)
    except KeyError as error:
        raise CheckpointError(f"{path} is no AlexNet or VGG-16: it has no {error.args[0]}.") from None
    if name == "dists" and config.kind != "vgg":
        raise CheckpointError(f"{path} is an AlexNet; DISTS needs a VGG-16.")
    with torch.device("meta"):
        network = Lpips(config) if name == "lpips" else Dists(config)
    take(network, {**tensors, **trained(name, config)}, path)
    network.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def of(a: Tensor, b: Tensor) -> Tensor:
        device = next(network.parameters()).device
        found: Tensor = network(a.to(device), b.to(device))
        return found.cpu()

    return Distance(f"lpips {config.kind}" if name == "lpips" else name, of)


def trained(name: str, config: TrunkConfig) -> dict[str, Tensor]:
    """The published weights of channels, named as the parameters of `Lpips` or `Dists`."""
    stem = f"lpips_{config.kind}" if name == "lpips" else name
    tensors = read_tensors(Path(str(files("triptych"))) / "weights" / "perceptual" / f"{stem}.safetensors")
    return {f"weights.{key}" if name == "lpips" else key: value for key, value in tensors.items()}
