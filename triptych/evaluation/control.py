"""How well pictures obey their ControlNet: edges, holes and small pictures, over held-out pictures.

Each function takes `count` pictures spread over a source, brings them to the model's size, and makes what
the control makes beside what it is compared with. Seeds are SEED_STRIDE times the seed, plus the picture's
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from triptych.conditioning.hints import EDGE_SIDE, canny_hint, cv2, shrunk
from triptych.conditioning.masks import box_mask
from triptych.data.shards import Sample
from triptych.data.sources import Source
from triptych.errors import DataError
from triptych.evaluation.evaluate import SEED_STRIDE, Progress, Report
from triptych.evaluation.icon_judge import LoadedJudge, load_judge
from triptych.evaluation.judges import judge_shapes
from triptych.evaluation.metrics import (
    Estimate,
    mean_interval,
    mobilenet_paired_distance,
    psnr,
    wilson,
)
from triptych.evaluation.prompts import shapes_prompts
from triptych.images import cover, to_images, to_pixels
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.control import FACTORS
from triptych.pipelines.request import Request

NEAR = 2  # pixels an edge may be off
FILL_REACH = 5  # of OpenCV's inpainting
PAPER = 0.7  # share of the side that shapes are drawn in, when a hole in white paper is filled


def evaluate_canny(
    cascade: Cascade,
    source: Source,
    count: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Edges asked for against edges got: F1 within NEAR pixels of a picture of EDGE_SIDE.

    `obedience` puts the F1 without a control at 0 and that of the plain reconstruction at 1.
    """
    samples, images, settings = _held_out(cascade, source, count, settings)
    made: dict[str, list[Image.Image]] = {"control": [], "no control": [], "reconstruction": []}
    rows: list[dict[str, Any]] = []
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        own = {**settings, "seed": seed * SEED_STRIDE + number}
        made["control"] += cascade.canny(image, sample.caption, **own).images
        made["no control"] += cascade.generate(sample.caption, **own).images
        made["reconstruction"] += cascade.reconstruct(image, sample.caption, **own).images
        asked = edges(image)
        rows.append(
            {"key": sample.key} | {f"f1, {kind}": edge_f1(asked, edges(made[kind][-1])) for kind in made}
        )
        _tell(progress, number, len(images))
    measures = {f"f1, {kind}": mean_interval([row[f"f1, {kind}"] for row in rows]) for kind in made}
    none, whole = measures["f1, no control"].value, measures["f1, reconstruction"].value
    obedience = (measures["f1, control"].value - none) / max(whole - none, 1e-6)
    return _report("canny", measures, rows, settings, {"source": images, **made}, {"obedience": obedience})


def edges(image: Image.Image) -> Tensor:
    """Canny edges of a picture brought to EDGE_SIDE, (EDGE_SIDE, EDGE_SIDE) of booleans."""
    pixels = F.interpolate(to_pixels([image]), (EDGE_SIDE, EDGE_SIDE), mode="bilinear", antialias=True)
    return canny_hint(pixels)[0, 0] > 0.5


def edge_f1(asked: Tensor, got: Tensor, near: int = NEAR) -> float:
    """F1 of edges (H,W) of booleans: those got that lie near one asked for, and the other way round."""
    if not bool(asked.any()) or not bool(got.any()):
        return float(bool(asked.any()) == bool(got.any()))

    def grown(lines: Tensor) -> Tensor:
        return F.max_pool2d(lines[None, None].float(), 2 * near + 1, stride=1, padding=near)[0, 0] > 0

    precision = float((got & grown(asked)).sum() / got.sum())
    recall = float((asked & grown(got)).sum() / asked.sum())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def evaluate_inpainting(
    cascade: Cascade,
    source: Source,
    count: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    **settings: Any,
) -> Report:
    """Random boxes filled by the ControlNet, by the mean colour around, and by OpenCV.

    Feature distance of the box and PSNR inside it, both to the true picture. And single shapes drawn into a
    hole in white paper: how often they are right, beside the same prompts without a picture.
    """
    judge = judge or load_judge()
    samples, images, settings = _held_out(cascade, source, count, settings)
    kinds = ("control", "mean colour", "opencv")
    made: dict[str, list[Image.Image]] = {kind: [] for kind in ("hole", *kinds)}
    rows: list[dict[str, Any]] = []
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        box = random_box(image.size, seed * SEED_STRIDE + number)
        own = {**settings, "seed": seed * SEED_STRIDE + number}
        fills = {"control": cascade.inpaint(image, sample.caption, box=box, **own).images[0]}
        mask = box_mask(box, image.size)[0, 0].bool().numpy()
        fills["mean colour"] = _mean_filled(image, mask)
        fills["opencv"] = _opencv_filled(image, mask)
        made["hole"].append(_mean_filled(image, mask, white=True))
        row: dict[str, Any] = {"key": sample.key}
        place = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        true = image.crop(place)
        for kind in kinds:
            made[kind].append(fills[kind])
            part = fills[kind].crop(place)
            near = mobilenet_paired_distance(judge.features([part]), judge.features([true]))
            row |= {
                f"distance, {kind}": float(near),
                f"psnr, {kind}": float(psnr(to_pixels([part]), to_pixels([true]))),
            }
        rows.append(row)
        _tell(progress, number, len(images))
    measures = {name: mean_interval([row[name] for row in rows]) for name in rows[0] if name != "key"}
    measures |= _shapes_in_holes(cascade, count, seed, settings)
    return _report("inpainting", measures, rows, settings, {"source": images, **made}, {})


def random_box(size: tuple[int, int], seed: int) -> tuple[int, int, int, int]:
    """A box (x, y, width, height) of 30 to 60 % of both sides of a picture of `size`."""
    draws = np.random.default_rng(seed).random(4)
    width, height = (int(side * (0.3 + 0.3 * u)) for side, u in zip(size, draws[:2], strict=True))
    return int(draws[2] * (size[0] - width)), int(draws[3] * (size[1] - height)), width, height


def _mean_filled(image: Image.Image, mask: np.ndarray, white: bool = False) -> Image.Image:
    array = np.array(image)
    array[mask] = 255 if white else array[~mask].mean(0).round().astype(np.uint8)
    return Image.fromarray(array)


def _opencv_filled(image: Image.Image, mask: np.ndarray) -> Image.Image:
    opencv = cv2()
    filled = opencv.inpaint(np.array(image), mask.astype(np.uint8) * 255, FILL_REACH, opencv.INPAINT_TELEA)
    return Image.fromarray(filled)


def _shapes_in_holes(
    cascade: Cascade, count: int, seed: int, settings: dict[str, Any]
) -> dict[str, Estimate]:
    """How often single shapes are right, drawn into a hole in white paper and drawn freely."""
    prompts = next(iter(shapes_prompts().values()))[:count]
    width, height = settings["size"]
    paper = Image.new("RGB", (width, height), "white")
    margin = int((1 - PAPER) / 2 * width), int((1 - PAPER) / 2 * height)
    box = (*margin, width - 2 * margin[0], height - 2 * margin[1])
    right: dict[str, list[bool]] = {"shape in a hole": [], "shape drawn freely": []}
    for number, prompt in enumerate(prompts):
        own = {**settings, "seed": seed * SEED_STRIDE + number}
        shown = {
            "shape in a hole": cascade.inpaint(paper, prompt.prompt, box=box, **own),
            "shape drawn freely": cascade.generate(prompt.prompt, **own),
        }
        for kind, result in shown.items():
            verdict = judge_shapes(result.images[0], prompt.objects, prompt.relations, None)
            right[kind].append(verdict.right)
    return {kind: wilson(sum(hits), len(hits)) for kind, hits in right.items()}


def evaluate_super_resolution(
    cascade: Cascade,
    source: Source,
    count: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    judge: LoadedJudge | None = None,
    kind: str = "pixel_super_resolution",
    **settings: Any,
) -> Report:
    """Small views of pictures drawn large again, beside the same views enlarged by bicubic interpolation.

    The view is 1/4 of the side for "pixel_super_resolution" (64 pixels of 256), 1/2 for "super_resolution".
    Told are the share of icons whose concept the judge names first, feature distance and PSNR to the true
    picture.
    """
    judge = judge or load_judge()
    samples, images, settings = _held_out(cascade, source, count, settings)
    factor = FACTORS[kind]
    made: dict[str, list[Image.Image]] = {"control": [], "bicubic": []}
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        (view,) = to_images(shrunk(to_pixels([image]), factor, "area"))
        own = {**settings, "seed": seed * SEED_STRIDE + number}
        made["control"] += cascade.upscale(view, sample.caption, factor=factor, **own).images
        made["bicubic"].append(view.resize(image.size, Image.Resampling.BICUBIC))
        _tell(progress, number, len(images))
    rows: list[dict[str, Any]] = [{"key": sample.key} for sample in samples]
    features, true = judge.features(images), to_pixels(images)
    for name, shown in made.items():
        distances = mobilenet_paired_distance(judge.features(shown), features)
        for row, distance, near in zip(
            rows, distances.tolist(), psnr(to_pixels(shown), true).tolist(), strict=True
        ):
            row |= {f"distance, {name}": distance, f"psnr, {name}": near}
    measures = {name: mean_interval([row[name] for row in rows]) for name in rows[0] if name != "key"}
    measures |= _concepts_first(judge, samples, {"source": images, **made})
    return _report(kind, measures, rows, settings, {"source": images, **made}, {})


def _concepts_first(
    judge: LoadedJudge, samples: Sequence[Sample], made: dict[str, list[Image.Image]]
) -> dict[str, Estimate]:
    """How often the judge names the concept first, of the pictures that have one it knows."""
    known = [row for row, sample in enumerate(samples) if sample.meta.get("concept") in judge.concepts]
    if not known:
        return {}
    concepts = [str(samples[row].meta["concept"]) for row in known]
    found = {}
    for name, images in made.items():
        ranks = judge.rank([images[row] for row in known], concepts)
        found[f"concept first, {name}"] = wilson(sum(rank == 1 for rank in ranks), len(ranks))
    return found


def _held_out(
    cascade: Cascade, source: Source, count: int, settings: dict[str, Any]
) -> tuple[list[Sample], list[Image.Image], dict[str, Any]]:
    """`count` readable samples spread over a source, their pictures at the model's size, and that size."""
    count = min(count, len(source))
    read = (source.read(index * len(source) // count) for index in range(count))
    samples = [sample for sample in read if sample is not None]
    if not samples:
        raise DataError("There is no readable picture to measure on.")
    size = cascade.resolve(Request(prompt="", **settings)).size
    assert size is not None
    return samples, [cover(sample.image, size) for sample in samples], {**settings, "size": size}


def _tell(progress: Progress | None, number: int, whole: int) -> None:
    if progress is not None:
        progress(number + 1, whole)


def _report(
    name: str,
    measures: dict[str, Estimate],
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    shown: dict[str, list[Image.Image]],
    numbers: dict[str, float],
) -> Report:
    images = [image for together in zip(*shown.values(), strict=True) for image in together]
    return Report(name, measures, rows, settings, images, numbers, columns=len(shown))
