"""Other words for a drawing: meanings read from WordNet's own files, keywords of emojilib, few of them that
no other name has, kind and colour."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from load_script import load_script

# In the format of wndb(5WN): a licence that two blanks indent, then one line a word or sense.
INDEX = """  1 This software is licensed.
bat n 3 2 @ ~ 3 1 00000010 00000020 00000030
"""
DATA = """  1 This software is licensed.
00000010 05 n 02 bat 0 chiropteran 0 000 | nocturnal (mouselike) mammal with wings; "it flew"
00000020 04 n 02 bat 1 at-bat 0 000 | a turn trying to get a hit
00000030 06 n 01 baseball_bat 0 000 | a club used for hitting a ball
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_icon_words")


@pytest.fixture(scope="module")
def words() -> ModuleType:
    return load_script("icon_words")


def row(
    name: str,
    keywords: str,
    colour: str = "red",
    share: float = 0.9,
    second: tuple[str, float] = ("white", 0.05),
    subgroup: str = "food-fruit",
) -> dict[str, Any]:
    return {
        "key": f"flat_{name}", "name": name, "captions": [f"a {name}", name], "keywords": keywords.split(),
        "subgroup": subgroup, "colours": [[colour, share], list(second)],
    }  # fmt: skip


def packed(path: Path, texts: dict[str, str]) -> Path:
    """A package of these files, as npm packs it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_senses_of_things_come_in_their_order(script: ModuleType, tmp_path: Path) -> None:
    texts = {f"dict/{kind}.noun": text for kind, text in (("index", INDEX), ("data", DATA))}
    path = packed(tmp_path / "wordnet.tgz", texts)
    animal, club = script.read_wordnet(path)["bat"]
    assert animal[:2] == ("05", ["bat", "chiropteran"])
    assert club == ("06", ["baseball bat"], "a club used for hitting a ball")
    assert script.clean(animal[2]) == "nocturnal mammal with wings"


def test_the_meanings_that_are_kept_are_clean(script: ModuleType, words: ModuleType) -> None:
    meanings = words.meanings()
    assert meanings["goat"][0].startswith("any of numerous agile ruminants")  # not the sign of the zodiac
    for texts in meanings.values():
        assert 1 <= len(texts) <= script.SYNONYMS + 1
        assert all(text and text == script.clean(text) for text in texts)


def test_a_meaning_belongs_to_one_name(words: ModuleType) -> None:
    texts = [text for found in words.meanings().values() for text in found]
    assert len(words.meanings()) > 500
    assert max(Counter(texts).values()) == 1
    assert "green apple" not in words.meanings()  # the red one has it


def test_keywords_are_those_the_catalogue_lacks(script: ModuleType, tmp_path: Path) -> None:
    words = {"\N{HEAVY BLACK HEART}\ufe0f": ["red_heart", "Love", "valentines_day", "like"]}
    path = packed(tmp_path / "emojilib.tgz", {"dist/emoji-en-US.json": json.dumps(words)})
    rows = {"red heart": row("red heart", "love") | {"emoji": "\N{HEAVY BLACK HEART}"}}
    found = script.find_keywords(rows, script.read_emojilib(path))
    assert found == {"red heart": ["valentines day", "like"]}


def test_few_keywords_are_told_where_one_name_alone_has_them(
    words: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "keywords", dict)
    known = {"quince": "sour tree jam", "plum": "tree jam blue", "grapefruit": "sour breakfast jam"}
    found = words.other_words([row(name, has, share=0.1) for name, has in known.items()])
    for name in known:
        few = [set(re.findall("[a-z]+", text)) for text in found[f"flat_{name}"]]
        assert few
        for other in known.keys() - {name}:
            assert not any(one <= set(known[other].split()) for one in few)
    assert "tree jam" not in found["flat_plum"]  # nor of the quince
    assert any("blue" in text for text in found["flat_plum"])


def test_kind_and_colour_mean_the_drawing_with_most_of_it(
    words: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "keywords", dict)
    found = words.other_words(
        [
            row("red apple", "", share=0.92), row("cherries", "", share=0.69),
            row("plum", "", "purple", 0.6, ("green", 0.2)), row("kiwi", "", "brown", 0.45),
            row("lobster", "", subgroup="animal-marine"), row("face", "", subgroup="face-smiling"),
        ]
    )  # fmt: skip
    assert found["flat_red apple"][-3:] == ["a red fruit", "a crimson fruit", "a scarlet fruit"]
    assert "a purple and green fruit" in found["flat_plum"]
    assert "a red sea animal" in found["flat_lobster"]
    assert not any("fruit" in text for key in ("cherries", "kiwi") for text in found[f"flat_{key}"])
    assert not any("red" in text.split() for text in found["flat_face"])
