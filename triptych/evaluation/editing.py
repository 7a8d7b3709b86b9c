"""How well a cascade follows pictures: variations by the icon judge, image to image by what is left.

Pictures are brought to one size, the model's own unless `size` is among the settings. Seeds are those of
`evaluate.make_pictures`: SEED_STRIDE times the seed, plus the picture's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from triptych.data.shards import ShardIndex
from triptych.data.sources import Source
from triptych.errors import DataError
from triptych.evaluation.evaluate import SEED_STRIDE, TOP, Progress, Report
from triptych.evaluation.icon_judge import LoadedJudge, load_judge
from triptych.evaluation.metrics import mean_interval, mobilenet_paired_distance, psnr, wilson
from triptych.images import cover, to_pixels
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.inputs import NOTHING, Inputs
from triptych.pipelines.pictures import encode_semantic
from triptych.pipelines.request import Request

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def evaluate_variations(
    cascade: Cascade,
    source: ShardIndex,
    count: int = 40,
    seeds: Sequence[int] = (0, 1),
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    **settings: Any,
) -> Report:
    """Vary icons without a prompt; measure how often the judge still names their concept first.

    Takes `count` icons of the judge's concepts, spread over `source`. Beside the variations stand the
    sources, their reconstructions, and pictures drawn from no prompt at all. MobileNetV2 distances tell how
    far variations are from their source, from other sources, and from each other (with two seeds or more).
    """
    judge = judge or load_judge()
    concepts, images = _icons(source, count, judge)
    request = cascade.resolve(Request(prompt="", **settings))
    images = [cover(image, request.size or image.size) for image in images]
    settings = {**settings, "size": request.size}
    drawn = [seed * SEED_STRIDE + index for seed in seeds for index in range(len(images))]
    whole = len(drawn) + 2 * len(images)
    latents = torch.cat([encode_semantic(cascade.parts, to_pixels([image])) for image in images])
    first = drawn[: len(images)]
    made = {"source": images, "variation": _vary(cascade, images, drawn, settings, progress, whole)}
    done = len(drawn)
    for kind, inputs in (("reconstruction", Inputs(latents_c=latents)), ("random", NOTHING)):
        made[kind] = _make(cascade, [""] * len(first), first, inputs, settings, progress, done, whole)
        done += len(first)
    rows = [
        {"kind": kind, "concept": concept, "rank": rank, "first": rank == 1, f"top{TOP}": rank <= TOP}
        for kind, shown in made.items()
        for concept, rank in _ranks(judge, shown, concepts)
    ]
    measures = {}
    for kind in ("variation", "reconstruction", "random", "source"):
        for name in ("first", f"top{TOP}"):
            hits = [bool(row[name]) for row in rows if row["kind"] == kind]
            measures[f"{kind}, {name}"] = wilson(sum(hits), len(hits))
    for name, values in _distances(judge, made).items():
        measures[f"distance, {name}"] = mean_interval(values)
    return Report(
        "variations", measures, rows, settings, _side_by_side(made, len(images)), columns=3 + len(seeds)
    )


def evaluate_img2img(
    cascade: Cascade,
    source: Source,
    count: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    strengths: Sequence[float] = STRENGTHS,
    **settings: Any,
) -> Report:
    """Change pictures towards the caption of another one, with growing strength; measure what stays.

    For each strength: the MobileNetV2 distance and the PSNR to the source, and how often the distance is
    larger than at the strength before.
    """
    judge = judge or load_judge()
    request = cascade.resolve(Request(prompt="", **settings))
    samples = [sample for index in range(len(source)) if (sample := source.read(index)) is not None][:count]
    if len(samples) < 2:
        raise DataError("Image to image is measured on at least two readable pictures with captions.")
    images = [cover(sample.image, request.size or sample.image.size) for sample in samples]
    prompts = [sample.caption for sample in samples[1:] + samples[:1]]
    drawn = [seed * SEED_STRIDE + index for index in range(len(images))]
    settings = {**settings, "size": request.size}
    latents = torch.cat([encode_semantic(cascade.parts, to_pixels([image])) for image in images])
    true, features = to_pixels(images), judge.features(images)
    rows: list[dict[str, Any]] = [{"key": sample.key} for sample in samples]
    made: dict[str, list[Image.Image]] = {"source": images}
    measures, before = {}, torch.zeros(len(images), dtype=torch.float64)
    for number, strength in enumerate(strengths):
        own = {**settings, "strength": strength}
        done, whole = number * len(images), len(strengths) * len(images)
        shown = _make(cascade, prompts, drawn, Inputs(start=latents), own, progress, done, whole)
        distance = mobilenet_paired_distance(judge.features(shown), features)
        near = psnr(to_pixels(shown), true)
        for row, far, decibels in zip(rows, distance.tolist(), near.tolist(), strict=True):
            row |= {f"distance at {strength:g}": far, f"psnr at {strength:g}": decibels}
        measures[f"distance at {strength:g}"] = mean_interval(distance.tolist())
        measures[f"psnr at {strength:g}"] = mean_interval(near.tolist())
        measures[f"further at {strength:g}"] = wilson(int((distance > before).sum()), len(images))
        made[f"{strength:g}"], before = shown, distance
    return Report(
        "img2img", measures, rows, settings, _side_by_side(made, len(images)), columns=1 + len(strengths)
    )


def _icons(source: ShardIndex, count: int, judge: LoadedJudge) -> tuple[list[str], list[Image.Image]]:
    """Concepts and pictures of `count` icons that the judge knows, spread evenly over the source."""
    known = [index for index in range(len(source)) if source.meta(index).get("concept") in judge.concepts]
    count = min(count, len(known))
    if count < 2:
        raise DataError("Variations are measured on icons of the judge's concepts; the data has none.")
    chosen = [known[index * len(known) // count] for index in range(count)]
    return [str(source.meta(index)["concept"]) for index in chosen], [source[index].image for index in chosen]


def _vary(
    cascade: Cascade,
    images: Sequence[Image.Image],
    seeds: Sequence[int],
    settings: dict[str, Any],
    progress: Progress | None,
    whole: int,
) -> list[Image.Image]:
    """A variation for every seed, the pictures taken in turn; `whole` pictures will be made in all."""
    made: dict[int, Image.Image] = {}
    for index, image in enumerate(images):
        own = range(index, len(seeds), len(images))
        drawn = cascade.vary(image, count=len(own), seeds=[seeds[one] for one in own], **settings)
        made.update(zip(own, drawn.images, strict=True))
        if progress is not None:
            progress(len(made), whole)
    return [made[index] for index in range(len(seeds))]


def _make(
    cascade: Cascade,
    prompts: Sequence[str],
    seeds: Sequence[int],
    inputs: Inputs,
    settings: dict[str, Any],
    progress: Progress | None,
    done: int,
    whole: int,
) -> list[Image.Image]:
    """The pictures of a request, `done` of `whole` having been made before."""
    images: list[Image.Image] = []
    for event in cascade.stream(list(prompts), inputs, seeds=tuple(seeds), **settings):
        if event.stage == "stage_a" and progress is not None:
            done += 1
            progress(done, whole)
        if event.result is not None:
            images = event.result.images
    return images


def _ranks(judge: LoadedJudge, images: list[Image.Image], concepts: list[str]) -> list[tuple[str, int]]:
    asked = concepts * (len(images) // len(concepts))
    return list(zip(asked, judge.rank(images, asked), strict=True))


def _distances(judge: LoadedJudge, made: dict[str, list[Image.Image]]) -> dict[str, list[float]]:
    """Feature distances between kinds of pictures, pair by pair."""
    features = {kind: judge.features(images) for kind, images in made.items()}
    source, variation = features["source"], features["variation"]
    copies = len(variation) // len(source)
    pairs = {
        "variation to its source": (variation, source.repeat(copies, 1)),
        "variation to another source": (variation, source.roll(1, 0).repeat(copies, 1)),
        "reconstruction to its source": (features["reconstruction"], source),
    }
    if copies > 1:
        pairs["variation to variation"] = (variation[: len(source)], variation[len(source) : 2 * len(source)])
    return {name: mobilenet_paired_distance(a, b).tolist() for name, (a, b) in pairs.items()}


def _side_by_side(made: dict[str, list[Image.Image]], count: int) -> list[Image.Image]:
    """For each source all that was made of it, in the order of the kinds."""
    return [
        images[index]
        for start in range(count)
        for images in made.values()
        for index in range(start, len(images), count)
    ]
