"""Feature networks by name: what turns pictures into vectors for the distances between sets.

    mobilenet   ImageNet's MobileNetV2, in the package; its distances compare with each other only
    inception   TensorFlow's Inception of 2015, for FID and KID; 96 MB, in WEIGHTS/inception
    clip        openai/clip-vit-large-patch14-336, for CMMD; 1.7 GB
    dinov2      facebook/dinov2-large, for FD-DINOv2; 1.2 GB

The last two are downloaded only when asked, Inception's file is the user's, and nothing falls back to another
network by itself: a list such as "clip,mobilenet" takes the first that is there. Any other name is a hub name
or a folder of a CLIP or DINOv2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.checkpoints.files import read_tensors
from triptych.errors import CheckpointError, DataError
from triptych.evaluation.distances import (
    NEIGHBOURS,
    cmmd,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.judge_weights import find_judge, take
from triptych.evaluation.systems import PICTURE_SUFFIXES
from triptych.images import read_picture, to_pixels
from triptych.models.inception import Inception, squeezed
from triptych.models.inception import layout as inception_layout

MOBILENET, INCEPTION = "mobilenet", "inception"
PUBLISHED = {
    "clip": ("openai/clip-vit-large-patch14-336", "1.7 GB"),
    "dinov2": ("facebook/dinov2-large", "1.2 GB"),
}
# What the distances over the features of a published network are called.
KNOWN_AS = {
    (INCEPTION, "frechet"): "FID",
    (INCEPTION, "kernel"): "KID",
    ("dinov2", "frechet"): "FD-DINOv2",
    ("clip", "cmmd"): "CMMD",
}
CLIP_SCALE = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_SCALE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH = 16


@dataclass(frozen=True)
class Features:
    """A network: its name, as it must stand beside every number, and pictures -> (N,D) float32."""

    name: str
    of: Callable[[Sequence[Image.Image]], Tensor]


def open_features(names: str, download: bool = False, weights: Path | None = None) -> Features:
    """The first network of a comma-separated list that is there; CheckpointError says how to get one.

    `weights` is the folder that holds inception/.
    """
    tried: list[str] = []
    for name in (part.strip() for part in names.split(",") if part.strip()):
        if name == MOBILENET:
            return Features(MOBILENET, load_judge().features)
        try:
            return _inception(weights) if name == INCEPTION else _tower(name, download)
        except CheckpointError as error:
            tried.append(str(error))
    raise CheckpointError(" ".join(tried) or "No feature network was named.")


def _inception(weights: Path | None) -> Features:
    """The Inception of pytorch-fid's file, whose names and shapes have to be those of the published one."""
    path = find_judge(INCEPTION, weights).file("*.safetensors")
    tensors = {name: t for name, t in read_tensors(path).items() if not name.endswith("num_batches_tracked")}
    came = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = inception_layout()
    if wrong := sorted(name for name in came.keys() | wanted if came.get(name) != wanted.get(name)):
        raise CheckpointError(
            f"{path} is not the Inception of FID: {len(wrong)} names or shapes differ ({wrong[0]} is "
            f"{came.get(wrong[0], 'missing')} in the file, {wanted.get(wrong[0], 'not')} in the network). "
            "Torchvision's Inception is another one: convert pytorch-fid's file."
        )
    with torch.device("meta"):
        network = Inception()
    take(network, tensors, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)

    def of(images: Sequence[Image.Image]) -> Tensor:
        found = []
        for start in range(0, len(images), BATCH):
            batch = [squeezed(to_pixels([image])) for image in images[start : start + BATCH]]
            with torch.no_grad():
                found.append(network(torch.cat(batch).to(device)).cpu())
        return torch.cat(found)

    return Features(INCEPTION, of)


def _tower(name: str, download: bool) -> Features:
    """A CLIP image tower or a DINOv2 of transformers, in float32 on the CPU or the first accelerator."""
    from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model

    place, size = PUBLISHED.get(name, (name, "its size is on its page"))
    local = not download or Path(place).is_dir()
    try:
        kind = AutoConfig.from_pretrained(place, local_files_only=local).model_type
        if kind not in ("clip", "clip_vision_model", "dinov2"):
            raise CheckpointError(f"{place} is a {kind}; a CLIP image tower or a DINOv2 was expected.")
        network: Any = Dinov2Model if kind == "dinov2" else CLIPVisionModelWithProjection
        tower = network.from_pretrained(place, local_files_only=local, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'The features "{name}" need {place} ({size}), which is not on this machine: download it with '
            "--download, give a folder that holds it, or ask for another network (--features mobilenet)."
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = tower.to(device).float().eval()
    mean, deviation = IMAGENET_SCALE if kind == "dinov2" else CLIP_SCALE
    side = int(tower.config.image_size)
    # DINOv2 takes any size; evaluations use 224, not the 518 of its grid of positions.
    side = 224 if name == "dinov2" else side

    def of(images: Sequence[Image.Image]) -> Tensor:
        found = []
        for start in range(0, len(images), BATCH):
            pixels = prepared(images[start : start + BATCH], side, mean, deviation).to(device)
            with torch.no_grad():
                answer = tower(pixel_values=pixels)
            found.append(answer.pooler_output if kind == "dinov2" else answer.image_embeds)
        return torch.cat(found).float().cpu()

    return Features(name, of)


def prepared(
    images: Sequence[Image.Image], side: int, mean: Sequence[float], deviation: Sequence[float]
) -> Tensor:
    """Pictures squeezed to a square (B,3,s,s) by cubic interpolation, as CMMD's and FD-DINOv2's authors
    do."""
    pixels = to_pixels([image.resize((side, side), Image.Resampling.BICUBIC) for image in images])
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def features_of(source: Path, network: Features, count: int | None = None) -> Tensor:
    """Features (N,D) of a folder's pictures, in the order of their names, or of a .npy file made elsewhere.

    A .npy file is how features of a network that is not here take part. Raises DataError.
    """
    if source.suffix == ".npy":
        return _stored(source)[:count]
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder of pictures nor a .npy file of features.")
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)[:count]
    if not paths:
        raise DataError(f"{source} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
    found = []
    for start in range(0, len(paths), BATCH):
        found.append(network.of([read_picture(path) for path in paths[start : start + BATCH]]))
    return torch.cat(found)


def _stored(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an array of features: {error}.") from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}; floats (N,D) were expected.")
    return torch.from_numpy(array.astype(np.float32))


def compare_sets(
    real: Path, made: Path, network: Features, count: int | None = None
) -> dict[str, float | int | str]:
    """Every distance between two folders of pictures (or files of features), with the network's name."""
    a, b = features_of(real, network, count), features_of(made, network, count)
    kid, deviation = kernel_distance(a, b)
    found: dict[str, float | int | str] = {
        "features": "from files" if real.suffix == made.suffix == ".npy" else network.name,
        "real pictures": len(a),
        "made pictures": len(b),
        "frechet": frechet_distance(a, b),
        "kernel": kid,
        "kernel deviation": deviation,
        "cmmd": cmmd(a, b),
    }
    if min(len(a), len(b)) > NEIGHBOURS:
        coverage = precision_recall(a, b)
        found |= {"precision": coverage.precision, "recall": coverage.recall}
    return found
