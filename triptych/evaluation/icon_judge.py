"""Which of a hundred concepts an icon shows, and the features a distance between sets of pictures is taken
in.

The judge is a small network trained only for judging (scripts/train_icon_judge.py): ImageNet's MobileNetV2
with one linear layer on top. Its weights and the list of its concepts come with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from triptych.checkpoints.files import read_metadata, read_tensors
from triptych.errors import CheckpointError, RequestError
from triptych.images import to_pixels
from triptych.models.mobilenet import IconJudge, IconJudgeConfig

BATCH = 25


@dataclass(frozen=True)
class LoadedJudge:
    """The network with the concepts of its scores, in their order."""

    network: IconJudge
    concepts: tuple[str, ...]

    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Scores (number of pictures, number of concepts), logits of a softmax."""
        with torch.no_grad():
            return torch.cat([self.network(pixels) for pixels in _pixels(images)])

    def rank(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[int]:
        """For each picture the rank of its concept among all: 1 when the judge names it first."""
        unknown = sorted(set(concepts) - set(self.concepts))
        if unknown:
            raise RequestError(
                f"The judge does not know {unknown[0]!r}: it knows {len(self.concepts)} concepts."
            )
        scores = self.scores(images)
        own = scores[torch.arange(len(images)), [self.concepts.index(c) for c in concepts]]
        return [int(rank) + 1 for rank in (scores > own[:, None]).sum(1)]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """MobileNetV2's ImageNet features (number of pictures, 1280), of pictures at their own size."""
        with torch.no_grad():
            return torch.cat([self.network.backbone.pooled(pixels) for pixels in _pixels(images)])


def _pixels(images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Batches of pictures of one size each; pictures of several sizes go one by one."""
    alike = len({image.size for image in images}) == 1
    step = BATCH if alike else 1
    for start in range(0, len(images), step):
        yield to_pixels(images[start : start + step])


def judge_file() -> Path:
    """Where the package keeps the judge's weights."""
    return Path(str(files("triptych"))) / "weights" / "judge" / "icons.safetensors"


def load_judge(path: Path | None = None) -> LoadedJudge:
    """The judge of the package, or of another file that scripts/train_icon_judge.py wrote, in float32."""
    path = path or judge_file()
    info = read_metadata(path)
    concepts = tuple(info.settings.get("concepts", ()))
    if info.part != "judge" or len(concepts) != info.config.get("classes"):
        raise CheckpointError(f"{path} holds {info.part or 'nothing known'}; an icon judge was expected.")
    network = IconJudge(IconJudgeConfig(**info.config))
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in read_tensors(path).items()}
    missing, unknown = network.load_state_dict(tensors, strict=False)
    if unknown or any(not name.endswith("num_batches_tracked") for name in missing):
        raise CheckpointError(f"{path} does not fit the icon judge: {[*unknown, *missing][0]} differs.")
    return LoadedJudge(network.eval().requires_grad_(False), concepts)
