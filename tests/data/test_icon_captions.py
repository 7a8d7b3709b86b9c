"""What the drawings of the icon set are called: a bare name means one of them, styles never drawn have a
stand-in, and nothing that validation asks is ever told."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
from load_script import load_script


@pytest.fixture(scope="module")
def icons() -> ModuleType:
    return load_script("build_icons")


@pytest.fixture(scope="module")
def captions() -> ModuleType:
    return load_script("icon_captions")


def row(
    style: str, name: str = "bell", background: str = "white", shard: str = "train-00000", n: int = 0
) -> dict:
    place = "" if background == "white" else f" on a {background} background"
    return {
        "key": f"{style}_{n}", "shard": shard, "name": name, "concept": name, "background": background,
        "emoji": "\N{BELL}", "keywords": ["chime", "gold", "ring", "sound"],
        "subgroup": "sound", "colours": [["gold", 0.9]],
        "captions": [
            f"a {name}{place}", name,
            f"a {style} icon of a {name} on a {background} background", f"a gold {name}",
        ],
    }  # fmt: skip


def told(captions: ModuleType, *rows: dict, left_out: tuple[str, ...] = ()) -> dict[str, list[str]]:
    styles = {style: style for style in captions.STYLES}
    return captions.retell(rows, styles, left_out)


def test_a_bare_name_means_one_drawing_on_white(captions: ModuleType) -> None:
    found = told(captions, row("flat", background="mint"), row("shaded"), row("simple flat"))
    assert {"bell", "a bell"} <= set(found["shaded_0"])
    for key in ("flat_0", "simple flat_0"):
        assert all(captions.STYLED.search(text) or text.startswith("a gold") for text in found[key])
    assert "a bell on a mint background, flat icon style" in found["flat_0"]


def test_every_name_has_one_house_drawing_that_is_trained_on(icons: ModuleType, captions: ModuleType) -> None:
    rows = list(icons.catalogue())
    house = captions.house_drawings(
        rows, {name: one.style for name, one in icons.SETS.items()}, icons.SHARE_ALIKE
    )
    by_key = {row["key"]: row for row in rows}
    for name, key in house.items():
        assert by_key[key]["name"] == name
        assert by_key[key]["shard"] != "val"
        assert captions.set_of(by_key[key]) not in icons.SHARE_ALIKE
    assert sum(by_key[key]["background"] == "white" for key in house.values()) > 0.98 * len(house)


def test_a_style_that_was_not_drawn_has_the_drawing_most_like_it(captions: ModuleType) -> None:
    found = told(captions, row("gradient"), row("flat"))
    assert any("3d render" in text for text in found["gradient_0"])
    assert not any("3d render" in text for text in found["flat_0"])
    assert any("simple flat" in text for text in found["flat_0"])


def test_pairs_held_out_and_sets_left_out_are_not_told(captions: ModuleType) -> None:
    found = told(
        captions,
        row("gradient"),
        row("flat"),
        row("3d", shard="val"),
        row("muted flat"),
        left_out=("muted flat",),
    )
    assert not any("3d render" in text for texts in found.values() for text in texts)
    assert "3d_0" not in found
    assert all("muted flat" in text or text.startswith("a gold") for text in found["muted flat_0"])


def test_the_house_drawing_is_told_in_other_words(captions: ModuleType) -> None:
    found = told(captions, row("flat"), row("gradient"))
    (meaning,) = {text for text in found["flat_0"] if "hollow device" in text}
    assert "bell" not in meaning
    assert any(text.startswith("chime, gold, ring, sound") for text in found["flat_0"])
    assert any(text.startswith("bell, chime, gold, ring, sound") for text in found["flat_0"])
    assert not any("hollow device" in text or "chime" in text for text in found["gradient_0"])


def test_a_noun_without_its_colour_means_the_first_that_has_one(captions: ModuleType) -> None:
    red, green = row("flat", "red apple"), row("flat", "green apple", n=1)
    red["emoji"], green["emoji"] = "\N{RED APPLE}", "\N{GREEN APPLE}"
    found = told(captions, green, red, row("flat", "blue circle", n=2))
    assert "an apple" in found["flat_0"]
    assert "an apple" not in found["flat_1"]
    assert "a circle" not in found["flat_2"]


def test_the_catalogue_tells_no_prompt_of_validation(icons: ModuleType, captions: ModuleType) -> None:
    rows = list(icons.catalogue())
    found = captions.retell(rows, {name: one.style for name, one in icons.SETS.items()}, icons.SHARE_ALIKE)
    assert len(found) == sum(row["shard"] != "val" for row in rows)
    prompts = set()
    for name in ("icons_100", "icons_val", "icons_described"):
        text = (files("triptych") / "evaluation" / "prompt_sets" / f"{name}.jsonl").read_text(
            encoding="utf-8"
        )
        prompts |= {json.loads(line)["prompt"] for line in text.splitlines()}
    assert prompts
    prompts.add("a shiny crimson fruit with a leaf")  # what docs/mini.md asks for in free words
    assert not prompts & {text for texts in found.values() for text in texts}
    bare = Counter(
        text for texts in found.values() for text in texts if text in ("a tennis ball", "tennis ball")
    )
    assert set(bare.values()) == {1}


def test_the_house_drawing_is_shown_again_for_every_three_others(icons: ModuleType) -> None:
    rows = list(icons.catalogue())
    again = icons.tell(rows)["house-00000"]
    by_key = {row["key"]: row for row in rows}
    eligible = sum(
        row["prototype"] != row["key"] and by_key[row["prototype"]]["background"] == row["background"]
        for row in rows
        if "prototype" in row
    )
    assert eligible / 3 <= len(again) < eligible / 2
    assert not {row["key"] for row in again} & by_key.keys()
    for one in again:
        drawing = by_key[one["key"].rpartition("-")[0]]
        assert one["icon"] == drawing["icon"]
        assert one["prototype"] == drawing["key"] == drawing["prototype"]
        told = {text for row in rows if row["name"] == one["name"] for text in row["captions"]}
        assert one["captions"]
        assert set(one["captions"]) <= told


def test_training_and_validation_lie_in_folders_of_their_own(icons: ModuleType, tmp_path: Path) -> None:
    shards = ("train-00000", "house-00000", "val", "shapes-train-00001")
    paths = [icons.shard_path(tmp_path, shard).relative_to(tmp_path).as_posix() for shard in shards]
    assert paths == [
        "train-00000.tar", "house-00000.tar", "validation/val.tar", "shapes/shapes-train-00001.tar",
    ]  # fmt: skip
