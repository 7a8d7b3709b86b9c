"""Does Stage C know which word belongs to which object? Its own loss, told captions with words exchanged.

Two captions with the same words, "a red cross to the left of a pink ring" and "a red ring to the left of a
pink cross", are told apart only by a network that binds words to places. How much worse it denoises the
pictures of the one when it is told the other says so without drawing anything.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from triptych.data.shapes import Mix, draw_shapes
from triptych.data.shards import Sample
from triptych.diffusion.prediction import add_noise, target
from triptych.diffusion.schedule import Schedule
from triptych.evaluation.evaluate import Progress, Report
from triptych.evaluation.metrics import mean_interval
from triptych.images import to_pixels
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.pictures import encode_semantic

FIRST_SEED = 7_000_000  # far from all that is trained on
TIMES = (0.95, 0.8, 0.65)  # where forms and colours are decided
TOGETHER = 16  # pictures a network call
EXCHANGED = ("forms", "colours")
PAIRS = Mix((("pair", 1.0),))


def evaluate_binding(cascade: Cascade, count: int = 100, progress: Progress | None = None) -> Report:
    """Draw `count` pairs of shapes, never trained on; measure how much exchanged words raise the loss.

    A measure "forms at 0.8" is the mean of loss(exchanged) / loss(right) - 1 over the pictures at time 0.8: 0
    for a network that knows only which words there are. The noise is the same for all three captions.
    Raises CheckpointError for a model that lacks Stage C or an encoder.
    """
    samples = different_pairs(count)
    told = {  # the caption that leaves out the background, whose colour may be one of the two
        "right": [sample.captions[1] for sample in samples],
        "forms": [exchange(sample.captions[1], *words(sample.meta, "shape")) for sample in samples],
        "colours": [exchange(sample.captions[1], *words(sample.meta, "colour")) for sample in samples],
    }
    pixels = to_pixels([sample.image for sample in samples])
    latents = torch.cat([encode_semantic(cascade.parts, rows) for rows in pixels.split(TOGETHER)])
    with cascade.parts.turn("text_encoder") as encoder:
        read = {name: encoder.encode(captions) for name, captions in told.items()}
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    rows: list[dict[str, Any]] = [{"prompt": caption} for caption in told["right"]]
    for done, time in enumerate(TIMES):
        losses = {name: stage_c_losses(cascade, latents, noise, time, *text) for name, text in read.items()}
        for number, row in enumerate(rows):
            for name in EXCHANGED:
                rise = losses[name][number] / losses["right"][number] - 1
                row[f"{name} at {time}"] = float(rise)
        if progress is not None:
            progress((done + 1) * count // len(TIMES), count)
    measures = {
        f"{name} at {time}": mean_interval([row[f"{name} at {time}"] for row in rows])
        for name in EXCHANGED
        for time in TIMES
    }
    return Report("binding", measures, rows, {"first_seed": FIRST_SEED, "times": list(TIMES)})


def different_pairs(count: int) -> list[Sample]:
    """The first pairs whose objects differ in form and in colour."""
    drawn = (draw_shapes(seed, mix=PAIRS) for seed in itertools.count(FIRST_SEED))
    return list(itertools.islice(filter(differs, drawn), count))


def differs(pair: Sample) -> bool:
    return all(len(set(words(pair.meta, kind))) == 2 for kind in ("shape", "colour"))


def words(meta: dict[str, Any], kind: str) -> tuple[str, str]:
    """The "shape" or "colour" of both objects of a pair."""
    first, second = meta["objects"]
    return first[kind], second[kind]


def exchange(caption: str, first: str, second: str) -> str:
    """The caption with two words in each other's place.

    >>> exchange("a red cross to the left of a pink ring", "cross", "ring")
    'a red ring to the left of a pink cross'
    """
    other = {first: second, second: first}
    return " ".join(other.get(word, word) for word in caption.split(" "))


@torch.no_grad()
def stage_c_losses(
    cascade: Cascade, latents: Tensor, noise: Tensor, time: float, hidden: Tensor, pooled: Tensor
) -> Tensor:
    """Stage C's squared error on each of `latents` (B,16,h,w) noised to `time`, (B,), without weights."""
    parts, schedule = cascade.parts, Schedule()
    kind = parts.info("stage_c").settings["prediction"]
    found = []
    with parts.turn("stage_c") as network:
        for x0, eps, text, vector in zip(
            *(rows.split(TOGETHER) for rows in (latents, noise, hidden, pooled)), strict=True
        ):
            logsnr = schedule.logsnr(torch.full((len(x0),), time, device=x0.device))
            x = add_noise(x0, eps, logsnr)
            dtype = next(network.parameters()).dtype
            given = (tensor.to(x0.device, dtype) for tensor in (x, schedule.time(logsnr), text, vector))
            wrong = network(*given).float() - target(kind, x0, eps, logsnr)
            found.append(wrong.square().mean((1, 2, 3)))
    return torch.cat(found)
