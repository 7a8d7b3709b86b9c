"""Whether a LoRA has taught its subject: pictures with the token come near the taught ones, the rest stay.

Nearness is the mean cosine between embeddings, by the model's own image encoder, of pictures that are drawn
and pictures that were taught. How far other prompts moved is 1 - cosine between what is drawn with the LoRA
and without it, from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from triptych.conditioning.encode import ImageEncoder, load_image_encoder
from triptych.images import to_pixels
from triptych.pipelines.cascade import Cascade

SUBJECT = ("a picture of {word}", "a drawing of {word}", "{word} on a white background")
OTHERS = ("a red apple", "a blue circle", "a green tree", "a yellow star", "a house", "a smiling face",
          "a car", "a flower")  # fmt: skip


@dataclass(frozen=True)
class Taught:
    """Numbers, and the pictures they were taken from: "with", "without", "others_with", "others_without"."""

    near_with: float
    near_without: float
    moved: float
    shown: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)

    @property
    def gain(self) -> float:
        """How much nearer the token brings a picture."""
        return self.near_with - self.near_without


def measure_taught(
    cascade: Cascade,
    lora: str,
    token: str,
    word: str,
    taught: Sequence[Image.Image],
    *,
    seeds: int = 1,
    others: Sequence[str] = OTHERS,
) -> Taught:
    """Draw with and without, `seeds` pictures a prompt, and compare. `word` is what the subject is one of.

    Raises CheckpointError for a model without an image encoder.
    """
    encoder = load_image_encoder(cascade.parts.path("image_encoder"))

    def draw(prompts: Sequence[str], put: str, *loras: str) -> list[Image.Image]:
        asked = tuple(prompt.format(word=put) for prompt in prompts)
        return cascade.generate(asked, count=seeds, seed=0, lora=loras).images

    shown = {
        "with": draw(SUBJECT, token, lora),
        "without": draw(SUBJECT, f"a {word}", lora),
        "others_with": draw(others, "", lora),
        "others_without": draw(others, ""),
    }
    wanted = embed(encoder, taught)
    found = {name: embed(encoder, images) for name, images in shown.items()}
    near = {name: float((found[name] @ wanted.T).mean()) for name in ("with", "without")}
    moved = float(1 - (found["others_with"] * found["others_without"]).sum(1).mean())
    return Taught(near["with"], near["without"], max(moved, 0.0), shown)


def embed(encoder: ImageEncoder, images: Sequence[Image.Image]) -> Tensor:
    """Embeddings (N, width) of length 1 of pictures of any size."""
    vectors = torch.cat([encoder.encode(to_pixels([image])) for image in images])
    return torch.nn.functional.normalize(vectors, dim=1)


def taught_pictures(shards: Sequence[str | Path], most: int = 16) -> list[Image.Image]:
    """The first readable pictures of a run's data."""
    from triptych.data.shards import ShardIndex

    found: list[Image.Image] = []
    for sample in ShardIndex(shards):
        found.append(sample.image)
        if len(found) == most:
            break
    return found
