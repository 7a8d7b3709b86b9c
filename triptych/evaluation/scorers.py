"""Published judges of pictures by name: agreement with the prompt, looks, what people prefer.

    clipscore     100 max(0, cosine) of CLIP ViT-L/14 [Hessel 2021; torchmetrics' convention]
    pickscore     scaled cosine of a CLIP ViT-H/14 taught by people's picks [Kirstain 2023]
    hps           cosine of a CLIP ViT-H/14 taught by people's preferences, HPS v2.1 [Wu 2023]
    imagereward   a BLIP with a head taught by people's ratings [Xu 2023]
    aesthetic     LAION's predictor of ratings over CLIP ViT-L/14; takes no prompt

Numbers of different judges do not compare, and each holds only beside the same judge's number for another
system over the same prompts. Weights are the user's (`judge_weights`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.conditioning.tokenizer import Tokenizer, clip_tokenizer, wordpiece_tokenizer
from triptych.errors import CheckpointError, nearest
from triptych.evaluation.judge_names import from_image_reward, from_open_clip
from triptych.evaluation.judge_weights import HUB, WORDS, JudgeFiles, find_judge, read_weights, take
from triptych.images import to_pixels
from triptych.models.clip import normalise
from triptych.models.reward import BlipConfig, ImageReward, RewardHead, head_widths

SCORERS = ("clipscore", "pickscore", "hps", "imagereward", "aesthetic")
REWARD_WINDOW = 35  # tokens that ImageReward reads
BATCH = 8


@dataclass(frozen=True)
class Scorer:
    """A judge: its name, and pictures with their prompts -> one number each."""

    name: str
    of: Callable[[Sequence[Image.Image], Sequence[str]], list[float]]


def open_scorers(names: Sequence[str], weights: Path | None) -> list[Scorer]:
    """The judges of these names, in order; all are looked for before one is opened.

    Raises CheckpointError that says how to get what is missing; no judge stands in for another.
    """
    for name in names:
        if name not in SCORERS:
            raise CheckpointError(f'There is no judge "{name}" of pictures: {nearest(name, SCORERS)}.')
    found = [find_judge(name, weights) for name in names]
    return [_OPEN[files.name](files) for files in found]


class ClipPair:
    """Both towers of a CLIP in transformers' layout, in float32."""

    def __init__(self, config: Path, tensors: dict[str, Tensor], path: Path) -> None:
        from transformers import CLIPConfig, CLIPModel

        with torch.device("meta"):
            self.network: Any = CLIPModel(CLIPConfig.from_dict(json.loads(config.read_text("utf-8"))))
        take(self.network, tensors, path)
        self.device = _ready(self.network)
        sizes: Any = self.network.config
        self.side = int(sizes.vision_config.image_size)
        self.window = int(sizes.text_config.max_position_embeddings)

    def images(self, images: Sequence[Image.Image], fit: Callable[..., Image.Image]) -> Tensor:
        """Unit embeddings (N,D) of pictures."""
        squares = to_pixels([fit(image, self.side) for image in images]).to(self.device)
        pooled = self.network.vision_model(pixel_values=normalise(squares)).pooler_output
        return nn.functional.normalize(self.network.visual_projection(pooled), dim=1)

    def texts(self, prompts: Sequence[str], words: Tokenizer) -> Tensor:
        """Unit embeddings (N,D) of prompts; what lies beyond the window is not read."""
        ids, mask = _first_windows(prompts, words, self.device)
        pooled = self.network.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return nn.functional.normalize(self.network.text_projection(pooled), dim=1)


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture whose shorter side is brought to `side`, as CLIP was trained."""
    width, height = image.size
    short = min(width, height)
    # The longer side is cut to whole pixels and the crop rounded down, as transformers does.
    size = (side * width // short, side * height // short)
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def padded(image: Image.Image, side: int) -> Image.Image:
    """A whole picture within a black square, as HPS v2 sees it."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side))
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


def _clip(files: JudgeFiles) -> tuple[ClipPair, Tokenizer]:
    weights = files.file(HUB[1])
    pair = ClipPair(files.file("config.json"), read_weights(weights), weights)
    return pair, clip_tokenizer(files.folder, pair.window)


def _clipscore(files: JudgeFiles) -> Scorer:
    pair, words = _clip(files)
    return _by_cosine(files.name, pair, words, lambda cosine: (100 * cosine).clamp(min=0), cropped)


def _pickscore(files: JudgeFiles) -> Scorer:
    pair, words = _clip(files)
    scale = pair.network.logit_scale.exp()
    return _by_cosine(files.name, pair, words, lambda cosine: scale * cosine, cropped)


def _hps(files: JudgeFiles) -> Scorer:
    weights = files.file("HPS_v2*")
    pair = ClipPair(files.file("config.json"), from_open_clip(read_weights(weights)), weights)
    words = clip_tokenizer(files.folder, pair.window)
    return _by_cosine(files.name, pair, words, lambda cosine: cosine, padded)


def _by_cosine(
    name: str,
    pair: ClipPair,
    words: Tokenizer,
    told: Callable[[Tensor], Tensor],
    fit: Callable[..., Image.Image],
) -> Scorer:
    def of(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return told((pair.images(images, fit) * pair.texts(prompts, words)).sum(1))

    return _batched(name, of)


def _aesthetic(files: JudgeFiles) -> Scorer:
    weights, head_file = files.file(HUB[1]), files.file("sac+logos+ava1-l14-linearMSE.*")
    pair = ClipPair(files.file("config.json"), read_weights(weights), weights)
    tensors = read_weights(head_file)
    with torch.device("meta"):
        head = RewardHead(_fitting(lambda: head_widths(_shapes(tensors)), head_file))
    take(head, tensors, head_file)
    head.to(pair.device)
    return _batched(files.name, lambda images, _: head(pair.images(images, cropped)))


def _imagereward(files: JudgeFiles) -> Scorer:
    path = files.file("ImageReward.*")
    tensors = from_image_reward(read_weights(path))
    with torch.device("meta"):
        network = ImageReward(_fitting(lambda: blip_config(_shapes(tensors)), path))
    take(network, tensors, path)
    device = _ready(network)
    words = wordpiece_tokenizer(files.file(WORDS), REWARD_WINDOW)

    def of(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        squares = to_pixels([cropped(image, network.side) for image in images]).to(device)
        ids, mask = _first_windows(prompts, words, device)
        rewards: Tensor = network(squares, ids, mask)
        return rewards

    return _batched(files.name, of)


_OPEN: dict[str, Callable[[JudgeFiles], Scorer]] = {
    "clipscore": _clipscore,
    "pickscore": _pickscore,
    "hps": _hps,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
}


def blip_config(shapes: dict[str, Sequence[int]]) -> BlipConfig:
    """The sizes of an ImageReward whose tensors have these shapes. Raises KeyError naming a missing one."""
    width, _, patch, _ = shapes["image.embeddings.patch_embedding.weight"]
    patches = shapes["image.embeddings.position_embedding"][1] - 1
    vocabulary, text_width = shapes["text.embeddings.word_embeddings.weight"]
    return BlipConfig(
        image_width=width,
        image_layers=sum(name.startswith("image.") and name.endswith(".mlp.fc1.bias") for name in shapes),
        image_mlp=shapes["image.encoder.layers.0.mlp.fc1.weight"][0],
        image_side=patch * round(patches**0.5),
        patch=patch,
        text_width=text_width,
        text_layers=sum(name.endswith(".crossattention.output.dense.bias") for name in shapes),
        text_mlp=shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
        vocabulary=vocabulary,
        positions=shapes["text.embeddings.position_embeddings.weight"][0],
        head=tuple(head_widths(shapes, "head.")),
    )


def _fitting(config: Callable[[], Any], path: Path) -> Any:
    try:
        return config()
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit this judge: it has no {error.args[0]}.") from None


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Sequence[int]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _ready(network: nn.Module) -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    return device


def _first_windows(prompts: Sequence[str], words: Tokenizer, device: torch.device) -> tuple[Tensor, Tensor]:
    windows = [words.windows(prompt)[0] for prompt in prompts]
    ids = torch.tensor([window.ids for window in windows], device=device)
    return ids, torch.tensor([window.mask for window in windows], device=device)


def _batched(name: str, of: Callable[[Sequence[Image.Image], Sequence[str]], Tensor]) -> Scorer:
    @torch.no_grad()
    def all_of(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(images), BATCH):
            some = slice(start, start + BATCH)
            found += of(images[some], prompts[some]).double().cpu().tolist()
        return found

    return Scorer(name, all_of)
