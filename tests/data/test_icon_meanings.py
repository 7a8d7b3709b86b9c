"""Meanings are read from WordNet's own files: senses in order, of things to be seen, first clause only."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import ModuleType

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
    return load_script("make_icon_meanings")


def test_senses_of_things_come_in_their_order(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "wordnet.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for kind, text in (("index", INDEX), ("data", DATA)):
            member = tarfile.TarInfo(f"package/dict/{kind}.noun")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    animal, club = script.read_wordnet(path)["bat"]
    assert animal[:2] == ("05", ["bat", "chiropteran"])
    assert club == ("06", ["baseball bat"], "a club used for hitting a ball")
    assert script.clean(animal[2]) == "nocturnal mammal with wings"


def test_the_meanings_that_are_kept_are_clean(script: ModuleType) -> None:
    meanings = load_script("icon_captions").meanings()
    assert meanings["goat"][0].startswith("any of numerous agile ruminants")  # not the sign of the zodiac
    for texts in meanings.values():
        assert 1 <= len(texts) <= script.SYNONYMS + 1
        assert all(text and text == script.clean(text) for text in texts)
