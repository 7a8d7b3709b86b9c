"""How well a cascade does: shapes by the pixel judge, icons by the classifier, pictures through its
autoencoders.

Every function makes or reads pictures, judges each, and returns a `Report`: one row per picture, and measures
with their 95 % intervals. The picture of prompt i and seed s is made with seed s * SEED_STRIDE + i, so that
each has noise of its own and any single one can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image

from triptych.data.sources import Source
from triptych.errors import DataError
from triptych.evaluation.icon_judge import LoadedJudge, load_judge
from triptych.evaluation.judges import judge_shapes
from triptych.evaluation.metrics import (
    Estimate,
    mean_interval,
    mobilenet_frechet_distance,
    mobilenet_paired_distance,
    psnr,
    ssim,
    wilson,
)
from triptych.evaluation.perceptual import Distance
from triptych.evaluation.prompts import IconPrompt, ShapesPrompt
from triptych.images import to_images, to_pixels
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.inputs import Inputs
from triptych.pipelines.pictures import encode_semantic
from triptych.pipelines.request import Request

SEED_STRIDE = 1_000_000
TOP = 5  # icons also report how often the concept is among the first five

Progress = Callable[[int, int], None]  # pictures done, pictures in all


@dataclass
class Report:
    """What was measured. `images` are in the order of `rows`; `pairs` says that they alternate with
    originals."""

    name: str
    measures: dict[str, Estimate]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    images: list[Image.Image] = field(default_factory=list, repr=False)
    numbers: dict[str, float] = field(default_factory=dict)  # measures of the whole set, without interval
    columns: int | None = None  # pictures that belong together, for a sheet of `images`

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values."""
        measures = {name: asdict(estimate) for name, estimate in self.measures.items()}
        return {
            "name": self.name,
            "measures": measures,
            "numbers": self.numbers,
            "settings": self.settings,
            "rows": self.rows,
        }


def make_pictures(
    cascade: Cascade,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[list[Image.Image], list[int], dict[str, Any]]:
    """One picture per prompt and seed, all prompts of the first seed first; their seeds; the settings
    used."""
    drawn = [seed * SEED_STRIDE + index for seed in seeds for index in range(len(prompts))]
    asked = [prompt for _ in seeds for prompt in prompts]
    images: list[Image.Image] = []
    used: dict[str, Any] = {}
    done = 0
    for event in cascade.stream(asked, seeds=tuple(drawn), **settings):
        if event.stage == "stage_a" and progress is not None:
            done += 1
            progress(done, len(asked))
        if event.result is not None:
            images = event.result.images
            used = event.result.request.model_dump(mode="json", exclude={"prompt", "seeds"})
    return images, drawn, used


def evaluate_shapes(
    cascade: Cascade,
    prompts: Sequence[ShapesPrompt],
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
    name: str = "shapes",
    **settings: Any,
) -> Report:
    """Draw each prompt with each seed and look at the pixels. `settings` are fields of `Request`.

    `right` is the share of pictures with exactly the objects asked for, colour and shape, in the relation
    asked for; the other measures tell where the rest fails.
    """
    images, drawn, used = make_pictures(cascade, [p.prompt for p in prompts], seeds, progress, **settings)
    rows: list[dict[str, Any]] = []
    for image, seed, prompt in zip(images, drawn, list(prompts) * len(seeds), strict=True):
        verdict = judge_shapes(image, prompt.objects, prompt.relations, prompt.background)
        rows.append(
            {
                "prompt": prompt.prompt,
                "seed": seed,
                "kind": prompt.kind,
                "right": verdict.right,
                "objects": verdict.objects,
                "colours": verdict.colours,
                "shapes": verdict.shapes,
                "count": verdict.count,
                "relations": verdict.relations,
                "background": verdict.background,
                "seen": [f"{seen.colour} {seen.shape}" for seen in verdict.seen.objects],
            }
        )
    names = ("right", "objects", "colours", "shapes", "count", "relations", "background")
    measures = {measure: share(rows, measure) for measure in names}
    return Report(name, {m: e for m, e in measures.items() if e.count}, rows, used, images)


def evaluate_icons(
    cascade: Cascade,
    prompts: Sequence[IconPrompt],
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    name: str = "icons",
    **settings: Any,
) -> Report:
    """Draw each prompt with each seed; measure how often the judge ranks its concept first of a hundred."""
    judge = judge or load_judge()
    images, drawn, used = make_pictures(cascade, [p.prompt for p in prompts], seeds, progress, **settings)
    asked = list(prompts) * len(seeds)
    scores = judge.scores(images)
    ranks = judge.rank(images, [prompt.concept for prompt in asked])
    rows = [
        {
            "prompt": prompt.prompt,
            "seed": seed,
            "concept": prompt.concept,
            "rank": rank,
            "first": rank == 1,
            f"top{TOP}": rank <= TOP,
            "seen": judge.concepts[int(score.argmax())],
        }
        for prompt, seed, rank, score in zip(asked, drawn, ranks, scores, strict=True)
    ]
    measures = {measure: share(rows, measure) for measure in ("first", f"top{TOP}")}
    return Report(name, measures, rows, used, images)


def evaluate_reconstruction(
    cascade: Cascade,
    source: Source,
    count: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    distances: Sequence[Distance] = (),
    **settings: Any,
) -> Report:
    """Pass pictures through Stage A alone, and through the semantic encoder, Stage B and Stage A.

    Takes the first `count` readable pictures of `source` whose size the model can make. PSNR and SSIM are per
    picture, and so are `distances` (LPIPS, DISTS: `perceptual.open_distances`); the MobileNetV2 distances are
    both per pair and, as a Fréchet distance, of the whole set. `images` holds original, Stage A and B+A in
    turn.
    """
    judge = judge or load_judge()
    rows: list[dict[str, Any]] = []
    kinds: dict[str, list[Image.Image]] = {"original": [], "a": [], "b+a": []}
    for index, (key, caption, image) in enumerate(_usable(source, count)):
        pixels = to_pixels([image])
        with cascade.parts.turn("stage_a") as stage_a, torch.no_grad():
            latents_b = stage_a.encode(pixels.to(cascade.device))
            through_a = stage_a.decode(latents_b).float().cpu().clamp(0, 1)
        latents_c = encode_semantic(cascade.parts, pixels)
        drawn = [seed * SEED_STRIDE + index]
        request = Request(prompt=caption, seeds=drawn, size=image.size, **settings)
        through_b = to_pixels(cascade.generate(request, Inputs(latents_c=latents_c)).images)
        row: dict[str, Any] = {"key": key}
        for kind, made in (("a", through_a), ("b+a", through_b)):
            kinds[kind] += to_images(made)
            row[f"{kind} psnr"] = float(psnr(made, pixels)[0])
            row[f"{kind} ssim"] = float(ssim(made, pixels)[0])
            row |= {f"{kind} {one.name}": float(one.of(made, pixels)[0]) for one in distances}
        kinds["original"].append(image)
        rows.append(row)
        if progress is not None:
            progress(index + 1, count)
    if not rows:
        raise DataError("There was no readable picture of a size that the model can make.")
    return _reconstruction_report(rows, kinds, judge, settings)


def _reconstruction_report(
    rows: list[dict[str, Any]],
    kinds: dict[str, list[Image.Image]],
    judge: LoadedJudge,
    settings: dict[str, Any],
) -> Report:
    features = {kind: judge.features(images) for kind, images in kinds.items()}
    numbers = {}
    for kind in ("a", "b+a"):
        paired = mobilenet_paired_distance(features[kind], features["original"])
        for row, distance in zip(rows, paired.tolist(), strict=True):
            row[f"{kind} mobilenet distance"] = distance
        if len(rows) > 1:
            numbers[f"{kind} mobilenet frechet"] = mobilenet_frechet_distance(
                features[kind], features["original"]
            )
    names = [name for name in rows[0] if name != "key"]
    measures = {name: mean_interval([row[name] for row in rows]) for name in sorted(names)}
    images = [image for together in zip(*kinds.values(), strict=True) for image in together]
    return Report("reconstruction", measures, rows, settings, images, numbers)


def _usable(source: Source, count: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Key, caption and picture of the first `count` samples whose sides are multiples of 32."""
    found = 0
    for index in range(len(source)):
        if found == count:
            return
        sample = source.read(index)
        if sample is not None and sample.image.width % 32 == 0 and sample.image.height % 32 == 0:
            found += 1
            yield sample.key, sample.caption, sample.image


def share(rows: Sequence[dict[str, Any]], name: str) -> Estimate:
    """The share of rows where `name` holds, among those that say anything about it."""
    told = [bool(row[name]) for row in rows if row[name] is not None]
    return wilson(sum(told), len(told))
