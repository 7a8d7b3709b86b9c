"""Evaluation: prompts, seeds, and verdicts on pictures whose truth is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from triptych import Cascade
from triptych.apps.cli.main import app
from triptych.data.shapes import HELDOUT, draw_shapes
from triptych.data.shards import Sample, ShardIndex
from triptych.data.sources import DrawnShapes
from triptych.errors import DataError, RequestError
from triptych.evaluation.editing import evaluate_img2img, evaluate_variations
from triptych.evaluation.evaluate import (
    SEED_STRIDE,
    evaluate_icons,
    evaluate_reconstruction,
    evaluate_shapes,
)
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.naming import evaluate_image_encoder
from triptych.evaluation.prompts import ShapesPrompt, icon_prompts, shapes_prompts
from triptych.pipelines.cascade import Event
from triptych.pipelines.pictures import embed_pictures
from triptych.pipelines.request import Request, Result

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"


class Copyist:
    """Stands in for a cascade: it "generates" known pictures, by prompt."""

    def __init__(self, images) -> None:
        self.images = images

    def stream(self, prompts, **settings):
        request = Request(prompt=tuple(prompts), **settings)
        pictures = request.pictures()
        images = [self.images[picture.prompt] for picture in pictures]
        for index, image in enumerate(images):
            yield Event("stage_a", 1, 1, [pictures[index]], image=image)
        result = Result(
            images=images, latents_c=None, latents_b=None, request=request, timings={}, metadata=[]
        )
        yield Event("done", 1, 1, pictures, result=result)


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path) -> Cascade:
    return Cascade.load(tiny_cascade, dtype="float32")


def test_there_are_a_hundred_prompts_a_set() -> None:
    sets = shapes_prompts()
    assert list(sets) == ["shapes_single", "shapes_pairs", "shapes_heldout"]
    for prompts in (*sets.values(), icon_prompts()):
        assert len(prompts) == 100
        assert len({(p.prompt, p.key) for p in prompts}) == 100
    assert len(shapes_prompts(everything=True)["shapes_val"]) == 300
    assert {p.concept for p in icon_prompts()} == set(load_judge().concepts)
    assert len(icon_prompts(everything=True)) >= 100


def test_prompts_say_what_is_asked_of_the_picture() -> None:
    for name, prompts in shapes_prompts().items():
        for prompt in prompts:
            assert all(o["shape"] in prompt.prompt and o["colour"] in prompt.prompt for o in prompt.objects)
            assert (prompt.background is not None) == ("background" in prompt.prompt)
            pairs = {(o["colour"], o["shape"]) for o in prompt.objects}
            assert bool(pairs & HELDOUT) == (name == "shapes_heldout")
            assert name != "shapes_pairs" or len(prompt.relations) == 1


def asked_of(sample) -> ShapesPrompt:
    meta = sample.meta
    objects, relations = tuple(meta["objects"]), tuple(meta["relations"])
    return ShapesPrompt(sample.caption, objects, relations, None, meta["kind"], "train", sample.key)


def test_true_pictures_are_all_right_and_shuffled_ones_are_not() -> None:
    samples = [draw_shapes(seed) for seed in range(12)]
    prompts = [asked_of(sample) for sample in samples]
    told: list[tuple[int, int]] = []
    true = Copyist({s.caption: s.image for s in samples})
    report = evaluate_shapes(true, prompts, seeds=(0, 1), progress=lambda *done: told.append(done))
    assert report.measures["right"].value == 1
    assert report.measures["right"].count == 24
    assert told == [(n, 24) for n in range(1, 25)]
    assert [row["seed"] for row in report.rows[:2]] == [0, 1]
    assert report.rows[12]["seed"] == SEED_STRIDE
    shuffled = Copyist({s.caption: t.image for s, t in zip(samples, samples[1:] + samples[:1], strict=True)})
    assert evaluate_shapes(shuffled, prompts).measures["right"].value < 0.2
    json.dumps(report.as_json())


def test_icons_are_ranked() -> None:
    judge = load_judge()
    samples = list(ShardIndex(FIXTURE, keep=lambda meta: meta.get("concept") in judge.concepts))
    prompts = [p for p in icon_prompts() if p.concept in {s.meta["concept"] for s in samples}]
    pictures = {s.meta["concept"]: s.image for s in samples}
    report = evaluate_icons(Copyist({p.prompt: pictures[p.concept] for p in prompts}), prompts, judge=judge)
    assert report.measures["first"].value >= 0.8
    assert report.measures["top5"].value >= report.measures["first"].value


def test_a_real_cascade_is_evaluated_and_repeats(cascade: Cascade) -> None:
    prompts = shapes_prompts()["shapes_single"][:3]
    first, second = (evaluate_shapes(cascade, prompts, size="64x64") for _ in range(2))
    assert first.rows == second.rows
    assert first.settings["steps"] == 3
    assert len(first.images) == 3


def test_reconstruction_measures_both_ways_down(cascade: Cascade) -> None:
    report = evaluate_reconstruction(cascade, DrawnShapes(3, canvases=[(64, 64), (64, 96)]), count=3)
    assert len(report.images) == 9
    assert {"a psnr", "a ssim", "b+a psnr", "a mobilenet distance"} <= set(report.measures)
    assert report.measures["a psnr"].count == 3
    assert "b+a mobilenet frechet" in report.numbers
    with pytest.raises(DataError, match="no readable picture"):
        evaluate_reconstruction(cascade, DrawnShapes(2, canvases=[(50, 50)]), count=2)


def test_variations_stand_beside_sources_reconstructions_and_random_pictures(cascade: Cascade) -> None:
    report = evaluate_variations(cascade, ShardIndex(FIXTURE), 3, seeds=(0, 1), size="64x64")
    kinds = [row["kind"] for row in report.rows]
    assert [kinds.count(kind) for kind in ("source", "variation", "reconstruction", "random")] == [3, 6, 3, 3]
    assert report.measures["source, first"].value >= 2 / 3
    assert report.measures["variation, first"].count == 6
    assert report.measures["distance, variation to variation"].value > 0
    assert len(report.images) == 3 * report.columns == 15
    unknown = ShardIndex(FIXTURE, keep=lambda meta: meta.get("concept") not in load_judge().concepts)
    with pytest.raises(DataError, match="the data has none"):
        evaluate_variations(cascade, unknown, 3)


def test_variations_are_what_vary_makes_with_the_same_seeds(cascade: Cascade) -> None:
    samples = ShardIndex(FIXTURE, keep=lambda meta: meta.get("concept") in load_judge().concepts)
    report = evaluate_variations(cascade, samples, 2, seeds=(0, 1), size="64x64")
    second = samples[len(samples) // 2].image
    alone = cascade.vary(second, seeds=[SEED_STRIDE + 1], size="64x64").images[0]
    assert report.images[report.columns + 2].tobytes() == alone.tobytes()


@dataclass
class Named:
    """Four drawings whose names and concepts are told."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample | None:
        return self.samples[index]


def test_an_image_encoder_is_measured_by_the_names_nearest_to_pictures(cascade: Cascade) -> None:
    told = [("a sun", "sun"), ("a moon", "moon"), ("another sun", "sun"), ("", "cloud")]
    source = Named(
        [
            Sample(
                str(seed), draw_shapes(seed, 64, 64).image, (f"caption {seed}",), {"name": n, "concept": c}
            )
            for seed, (n, c) in enumerate(told)
        ]
    )
    report = evaluate_image_encoder(cascade, source, 100)
    names = ["a sun", "a moon", "caption 3"]  # one of each concept; a caption where there is no name
    assert [row["name"] for row in report.rows] == names
    embeds = embed_pictures(cascade.parts, report.images).double()
    with cascade.parts.turn("text_encoder") as encoder:
        pooled = encoder.encode(names)[1].double()
    nearness = torch.nn.functional.cosine_similarity(embeds[:, None], pooled[None], dim=2)
    ranks = [sorted(row, reverse=True).index(row[own]) + 1 for own, row in enumerate(nearness.tolist())]
    assert [row["rank"] for row in report.rows] == ranks
    assert report.measures["first"].value == pytest.approx(sum(rank == 1 for rank in ranks) / 3)
    assert report.measures["top5"].value == 1  # of three
    with pytest.raises(DataError, match="at least two"):
        evaluate_image_encoder(cascade, source, 1)


def test_more_strength_leaves_less_of_a_picture(cascade: Cascade) -> None:
    report = evaluate_img2img(cascade, DrawnShapes(3), 3, strengths=(0.0, 0.5, 1.0), steps=4, size="64x64")
    distances = [report.measures[f"distance at {strength}"].value for strength in ("0", "0.5", "1")]
    assert distances[0] < distances[2]
    assert len(report.images) == 3 * report.columns == 12
    with pytest.raises(DataError, match="at least two"):
        evaluate_img2img(cascade, DrawnShapes(1), 1)


def test_the_command_prints_a_table_and_writes_files(tiny_cascade: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "shapes", "--model", str(tiny_cascade), "--size", "64x64", "--count", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert "shapes_pairs (2 pictures)" in result.output
    assert "right" in result.output
    names = {path.name for path in (tmp_path / "new").iterdir()}
    sets = ("shapes_single", "shapes_pairs", "shapes_heldout")
    kinds = ["json", "jsonl", "png", *(["parquet"] if find_spec("pyarrow") else [])]
    assert names == {f"{name}.{kind}" for name in sets for kind in kinds}
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert [report["name"] for report in json.loads(result.stdout)] == list(sets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shape"], 'called "shape": did you mean "shapes"'),
        (["icons", "--data", "x.tar"], "--data is for reconstruction, image_encoder, variations"),
        (["image_encoder", "--steps", "3"], "image_encoder draws nothing: leave steps out"),
        (["binding", "--guidance", "3"], "binding draws nothing: leave guidance out"),
        (["binding", "--data", "x.tar"], "--data is for reconstruction, image_encoder, variations"),
        (["variations"], "name a tar shard of them with --data"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(result.exception, RequestError)
    assert message in str(result.exception)
