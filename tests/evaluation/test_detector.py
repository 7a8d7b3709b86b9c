"""Things in pictures: the rules on boxes that are known, and a tiny random detector loaded as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from triptych.errors import CheckpointError, DataError
from triptych.evaluation.detector import (
    PALETTE,
    Detector,
    Thing,
    apart,
    colour_of,
    judge_things,
    open_detector,
    overlap,
    stands,
)
from triptych.evaluation.objects import COLOURS, THINGS, object_prompts
from triptych.evaluation.prompts import study_prompts

LEFT, RIGHT, LOW = (10.0, 30.0, 40.0, 60.0), (60.0, 30.0, 90.0, 60.0), (35.0, 70.0, 65.0, 98.0)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A red thing at LEFT and a blue one at RIGHT on white, a white one at LOW on grey."""
    image = Image.new("RGB", (100, 100), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 62, 100, 100), fill=(128, 128, 128))
    draw.ellipse(LEFT, fill=(210, 20, 30))
    draw.ellipse(RIGHT, fill=(30, 80, 190))
    draw.rectangle(LOW, fill=(245, 245, 245))
    return image


def things(*named: tuple[str, tuple[float, ...]], confidence: float = 0.9) -> list[Thing]:
    return [Thing(name, confidence, box) for name, box in named]


def test_colours_are_those_of_the_thing_and_not_of_what_is_around(picture: Image.Image) -> None:
    assert [colour_of(picture, box) for box in (LEFT, RIGHT, LOW)] == ["red", "blue", "white"]


def test_positions_hold_when_far_enough_apart() -> None:
    assert stands(LEFT, "left of", RIGHT)
    assert stands(RIGHT, "right of", LEFT)
    assert stands(LEFT, "above", LOW)
    assert stands(LOW, "below", RIGHT)
    assert not stands(RIGHT, "left of", LEFT)
    assert not stands(LEFT, "above", RIGHT)
    assert not stands(LEFT, "left of", (12.0, 30.0, 42.0, 60.0))  # as good as the same place
    with pytest.raises(DataError, match='no position "under": '):
        stands(LEFT, "under", LOW)


def test_one_thing_is_seen_once() -> None:
    twice = things(("cup", LEFT), ("cup", (11.0, 30.0, 41.0, 60.0)), ("dog", LEFT), ("cup", RIGHT))
    assert [thing.name for thing in apart(twice)] == ["cup", "dog", "cup"]
    assert overlap(LEFT, LEFT) == 1
    assert overlap(LEFT, RIGHT) == 0


@pytest.mark.parametrize(
    ("seen", "truth", "right"),
    [
        ([("cup", LEFT)], {"include": [{"class": "cup", "count": 1}]}, True),
        ([("dog", LEFT)], {"include": [{"class": "cup", "count": 1}]}, False),
        ([("cup", LEFT)], {"include": [{"class": "cup", "count": 1, "color": "red"}]}, True),
        ([("cup", LEFT)], {"include": [{"class": "cup", "count": 1, "color": "blue"}]}, False),
        ([("cup", LEFT), ("cup", RIGHT)], {"include": [{"class": "cup", "count": 2}]}, True),
        (
            [("cup", LEFT), ("cup", RIGHT), ("cup", LOW)],
            {"include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]},
            False,
        ),
        (
            [("motorcycle", LEFT), ("dog", RIGHT)],
            {
                "include": [
                    {"class": "dog", "count": 1},
                    {"class": "motorbike", "count": 1, "position": ["left of", 0]},
                ]
            },
            True,
        ),
        (
            [("dog", LEFT), ("cup", RIGHT)],
            {
                "include": [
                    {"class": "dog", "count": 1},
                    {"class": "cup", "count": 1, "position": ["left of", 0]},
                ]
            },
            False,
        ),
        (
            [("dog", LEFT), ("cup", RIGHT)],
            {
                "include": [
                    {"class": "dog", "count": 1, "color": "blue"},
                    {"class": "cup", "count": 1, "color": "red"},
                ]
            },
            False,
        ),
    ],
)
def test_a_picture_is_right_when_it_shows_what_was_asked_for(
    picture: Image.Image, seen: list, truth: dict, right: bool
) -> None:
    assert judge_things(picture, things(*seen), truth)["right"] is right


def test_what_is_uncertain_does_not_count(picture: Image.Image) -> None:
    two = {"include": [{"class": "cup", "count": 2}]}
    assert not judge_things(picture, things(("cup", LEFT), ("cup", RIGHT), confidence=0.4), two)["right"]
    found = judge_things(picture, things(("cup", LEFT)), {"include": [{"class": "cup", "count": 1}]})
    assert (found["count"], found["colours"], found["relations"], found["seen"]) == (
        None,
        None,
        None,
        ["cup"],
    )


def write_detector(folder: Path) -> None:
    """A YOLOS with random weights in the hub's layout; it knows every thing of the prompts."""
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=6,
        id2label=dict(enumerate(THINGS)),
        label2id={name: number for number, name in enumerate(THINGS)},
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "YolosImageProcessor",
        "size": {"shortest_edge": 32, "longest_edge": 64},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def test_a_detector_in_a_folder_sees_what_transformers_sees(picture: Image.Image, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, YolosForObjectDetection

    write_detector(tmp_path / "detector")
    detector = open_detector(tmp_path)
    found = detector.see(picture, threshold=0.0)
    prepare = AutoImageProcessor.from_pretrained(tmp_path / "detector")
    network = YolosForObjectDetection.from_pretrained(tmp_path / "detector").eval()
    with torch.no_grad():
        logits = network(**prepare(images=[picture], return_tensors="pt")).logits[0]
    scores, labels = logits.softmax(-1)[:, :-1].max(-1)  # the last class is "nothing"
    assert found[0].confidence == pytest.approx(float(scores.max()), abs=1e-5)
    assert found[0].name == THINGS[int(labels[scores.argmax()])]
    row = detector.verdict(picture, {"include": [{"class": "tv", "count": 1}]})
    assert row["right"] in (True, False)
    with pytest.raises(DataError, match='does not know "dragon"'):
        detector.verdict(picture, {"include": [{"class": "dragon", "count": 1}]})


def test_a_folder_without_a_detector_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download PekingU/rtdetr_r50vd"):
        open_detector(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="no object detector"):
        Detector(tmp_path)


def test_prompts_of_things_ask_for_one_skill_each() -> None:
    rows = object_prompts()
    assert len({row["prompt"] for row in rows}) == len(rows) == 120
    for row in rows:
        include = row["truth"]["include"]
        assert all(asked["class"] in row["prompt"] or asked["count"] > 1 for asked in include), row
        assert all(asked.get("color", "") in row["prompt"] for asked in include)
        assert ("position" in str(include)) == (row["kind"] == "position")
    assert set(COLOURS) <= set(PALETTE)
    first = next(row for row in rows if row["kind"] == "position")
    position, _ = first["truth"]["include"][1]["position"]
    words = first["prompt"].split(f" {position} ")
    assert [first["truth"]["include"][n]["class"] in words[1 - n] for n in (0, 1)] == [True, True]
    assert [p.truth for p in study_prompts("objects")] == [row["truth"] for row in rows]


def test_genevals_own_file_is_understood(tmp_path: Path) -> None:
    line = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    }
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = study_prompts(str(tmp_path / "evaluation_metadata.jsonl"))
    assert prompt.truth == {"include": line["include"], "exclude": line["exclude"]}
    assert prompt.category == "counting"
