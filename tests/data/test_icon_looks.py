"""Other looks of a drawing: each is one rule, seen in the pixels; their captions say it, and nothing else."""

from __future__ import annotations

import json
from importlib.resources import files
from types import ModuleType

import numpy as np
import pytest
from load_script import load_script
from PIL import Image, ImageDraw

from triptych.evaluation.looks import has_look


@pytest.fixture(scope="module")
def icons() -> ModuleType:
    return load_script("build_icons")


@pytest.fixture(scope="module")
def looks() -> ModuleType:
    return load_script("icon_looks")


@pytest.fixture(scope="module")
def rows(icons: ModuleType, looks: ModuleType) -> list[dict]:
    styles = {name: one.style for name, one in icons.SETS.items()}
    return looks.other_looks(list(icons.catalogue()), styles, icons.SHARE_ALIKE)


def house() -> Image.Image:
    """A red house with a yellow door and an orange roof, on nothing."""
    image = Image.new("RGBA", (400, 400))
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 180, 340, 399), fill=(200, 40, 30, 255))
    draw.polygon([(20, 180), (380, 180), (200, 0)], fill=(240, 130, 30, 255))
    draw.rectangle((170, 280, 230, 399), fill=(250, 220, 40, 255))
    return image


def on_white(drawing: Image.Image, icons: ModuleType) -> Image.Image:
    return icons.place(drawing, 220, (255, 255, 255))


def test_line_art_is_ink_on_white_along_every_edge(looks: ModuleType, icons: ModuleType) -> None:
    answer = looks.line_art(house())
    levels = {colour for _, colour in answer.getcolors() if colour[3]}
    assert levels == {(*looks.INK, 255), (255, 255, 255, 255)}
    margin = (answer.width - 400) // 2
    picture = np.asarray(answer)
    for x, y, dark in (
        (200, 180, True),
        (170, 340, True),
        (60, 300, True),
        (120, 300, False),
        (200, 340, False),
    ):
        assert (picture[y + margin, x + margin, 0] == looks.INK[0]) == dark, (x, y)
    assert has_look(on_white(answer, icons), "line art")


def test_outlines_keep_the_colours_between_them(looks: ModuleType) -> None:
    answer = looks.outlined(house())
    margin = (answer.width - 400) // 2
    for x, y in ((120, 300), (200, 340), (200, 90)):
        assert answer.getpixel((x + margin, y + margin)) == house().getpixel((x, y))
    assert answer.getpixel((60 + margin, 300 + margin))[:3] == looks.INK


def test_a_silhouette_and_greys_keep_the_form(looks: ModuleType, icons: ModuleType) -> None:
    for look in ("silhouette", "black and white"):
        answer = looks.with_look(house(), look)
        assert answer.getchannel("A").tobytes() == house().getchannel("A").tobytes()
        assert has_look(on_white(answer, icons), look)
    assert len(set(looks.silhouette(house()).convert("L").tobytes())) == 1
    assert len(set(looks.black_and_white(house()).convert("L").tobytes())) >= 3


@pytest.mark.parametrize("colour", ["green", "blue", "purple"])
def test_hues_turn_together(looks: ModuleType, icons: ModuleType, colour: str) -> None:
    answer = looks.in_colour(house(), colour)
    assert has_look(on_white(answer, icons), colour)
    assert not has_look(on_white(house(), icons), colour)
    # The roof's hue stays as far from the wall's as it was.
    before, after = (
        [image.convert("RGB").convert("HSV").getpixel(place)[0] for place in ((120, 300), (200, 90))]
        for image in (house(), answer)
    )
    assert abs(((after[1] - after[0]) - (before[1] - before[0]) + 128) % 256 - 128) <= 3


def test_looks_say_what_they_are_and_nothing_that_validation_asks(
    rows: list[dict], looks: ModuleType, icons: ModuleType
) -> None:
    asked = set()
    for name in ("icons_100", "icons_val", "icons_described"):
        text = (files("triptych") / "evaluation" / "prompt_sets" / f"{name}.jsonl").read_text(
            encoding="utf-8"
        )
        asked |= {json.loads(line)["prompt"] for line in text.splitlines()}
    styles = {name: one.style for name, one in icons.SETS.items()}
    unheard = looks.held_out(list(icons.catalogue()), styles)
    assert any(look == "outlined" for _, look in unheard)
    kinds = {row["look"] for row in rows}
    assert kinds == {*looks.LOOKS, *looks.HUES}
    for row in rows:
        assert not asked & set(row["captions"])
        assert (row["name"], row["look"]) not in unheard
        words = {"silhouette": ("silhouette", "shadow"), "line art": ("line", "outline")}
        said = words.get(row["look"], (row["look"], "shades of gray"))
        assert all(any(word in text for word in said) for text in row["captions"]), row["captions"]


def test_a_colour_that_has_a_name_of_its_own_is_not_made(rows: list[dict]) -> None:
    recoloured = {text for row in rows for text in row["captions"] if row["look"] == "blue"}
    assert "a blue bell" in recoloured
    assert not {"a blue heart", "a blue circle", "a blue red apple", "a blue book"} & recoloured


def test_rows_of_looks_have_keys_of_their_own_and_learn_the_plain_drawing(icons: ModuleType) -> None:
    rows = list(icons.catalogue())
    keys = {row["key"] for row in rows}
    made = icons.tell(rows)["looks-00000"]
    assert len({row["key"] for row in made} - keys) == len(made)
    assert all(row["key"].startswith(row["prototype"]) and row["prototype"] in keys for row in made)
