"""Looks are judged from pixels: drawings made to a look have it, plain ones do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from triptych.apps.cli.main import app
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.looks import ASKED, HUES, THINGS, evaluate_looks, has_look
from triptych.evaluation.prompts import described_prompts
from triptych.pipelines.cascade import Event
from triptych.pipelines.request import Request, Result

COLOURS = {"purple": (150, 60, 200), "green": (40, 170, 60), "blue": (50, 110, 220), "red": (220, 40, 40)}


def drawn(look: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    image = Image.new("RGB", (256, 256), background)
    draw = ImageDraw.Draw(image)
    if look == "line art":
        draw.ellipse((50, 50, 200, 200), outline=(20, 20, 20), width=6)
    elif look == "silhouette":
        draw.ellipse((50, 50, 200, 200), fill=(20, 20, 20))
    elif look == "black and white":
        draw.ellipse((50, 50, 200, 200), fill=(150, 150, 150), outline=(20, 20, 20), width=8)
    else:
        draw.ellipse((50, 50, 200, 200), fill=COLOURS[look])
    return image


@pytest.mark.parametrize("background", [(255, 255, 255), (215, 232, 252)])
def test_each_look_is_seen_and_no_other(background: tuple[int, int, int]) -> None:
    for look in (*ASKED, "red"):
        assert [kind for kind in (*ASKED, "red") if has_look(drawn(look, background), kind)] == [look]


def test_an_empty_picture_has_no_look() -> None:
    blank = Image.new("RGB", (64, 96), (240, 240, 240))
    assert not any(has_look(blank, look) for look in (*ASKED, *HUES))


class Painter:
    """Stands in for a cascade: it draws the look that a prompt names if it `listens`, and red otherwise."""

    def __init__(self, listens: bool) -> None:
        self.listens = listens

    def stream(self, prompts: list[str], **settings: Any) -> Iterator[Event]:
        request = Request(prompt=tuple(prompts), **settings)
        named = [next((look for look in ASKED if self.listens and look in text), "red") for text in prompts]
        result = Result(
            images=[drawn(look) for look in named], latents_c=None, latents_b=None, request=request,
            timings={}, metadata=[],
        )  # fmt: skip
        yield Event("done", 1, 1, request.pictures(), result=result)


def test_the_share_that_has_the_look_is_told_by_look_and_beside_what_was_not_asked() -> None:
    report = evaluate_looks(Painter(listens=True), count=3)
    assert {name: measure.value for name, measure in report.measures.items()} == {
        "right": 1.0, "unasked": 0.0, **dict.fromkeys(ASKED, 1.0),
    }  # fmt: skip
    assert len(report.images) == len(report.rows) == 3 * len(ASKED)
    assert evaluate_looks(Painter(listens=False), count=3).measures["right"].value == 0
    assert len(evaluate_looks(Painter(listens=True)).rows) == len(THINGS) * len(ASKED)


def test_descriptions_do_not_say_the_name() -> None:
    prompts = described_prompts()
    assert len({p.prompt for p in prompts}) == len(prompts) == 72
    assert {p.concept for p in prompts} <= set(load_judge().concepts)
    for prompt in prompts:
        assert prompt.concept.lower() not in prompt.prompt.lower()


@pytest.mark.parametrize(("what", "pictures"), [("words", 2), ("looks", 2 * len(ASKED))])
def test_the_command_measures_both(what: str, pictures: int, tiny_cascade: Path) -> None:
    arguments = ["evaluate", what, "--model", str(tiny_cascade), "--size", "64x64", "--count", "2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert report["name"] == what
    assert len(report["rows"]) == pictures
