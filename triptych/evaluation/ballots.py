"""Blind voting: which pairs are shown to whom, on which side, and what a vote says.

A ballot asks one question about two pictures of one prompt. Sides and order are drawn anew for every voter by
a keyed hash, so that nothing but the votes has to be kept, and nothing in a ballot tells which system drew
what. The pair with the fewest votes comes first. Now and then one of the pictures is a degraded twin of the
other: who does not see that is not counted. Votes are lines in FOLDER/study/votes.jsonl.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from triptych.errors import DataError, RequestError, SettingsError, nearest
from triptych.evaluation.compare import read_json, read_records, stored_prompts
from triptych.evaluation.lines import LineWriter, read_lines
from triptych.images import replace

QUESTIONS = {
    "alignment": "Which picture shows this better?",
    "looks": "Which picture looks better?",
}
ANSWERS = ("left", "right", "tie", "skip")
CHECK = "(degraded)"  # stands for the second system in an attention check
TRUSTED = 0.8  # least share of attention checks that a voter must get right
VOTER = re.compile(r"[A-Za-z0-9_-]{8,64}")

Row = dict[str, Any]
Answer = Literal["left", "right", "tie", "skip"]


class Design(BaseModel):
    """How a study is run; written once, when its voting begins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str = Field(description="the system that the others are compared with")
    all_pairs: bool = Field(False, description="compare every two systems")
    raters: int = Field(3, ge=1, description="voters who are to see each pair")
    session: int = Field(40, ge=2, description="votes asked of a voter at a time; each question has half")
    check_every: int = Field(10, ge=2, description="one of so many ballots is an attention check")
    secret: str = Field(description="key of the hashes; who has it can tell which system is which")


@dataclass(frozen=True)
class Item:
    """One question about the pictures that two systems drew of one prompt with one seed."""

    question: str
    stem: str
    index: int
    a: str
    b: str

    @property
    def key(self) -> str:
        return "/".join((self.question, self.stem, self.a, self.b))

    @property
    def is_check(self) -> bool:
        return self.b == CHECK


@dataclass(frozen=True)
class Ballot:
    """What a voter is shown. `left` and `right` are picture tokens; `prompt` is None where it is hidden."""

    id: str
    question: str
    text: str
    prompt: str | None
    left: str
    right: str
    number: int  # of this ballot in the voter's session, from 1
    session: int


def open_design(folder: Path, **wanted: Any) -> Design:
    """The design of a study, made at the first call from `wanted` (None: the default).

    Raises SettingsError when a later call wants another one, or an unknown reference.
    """
    systems = list(read_json(folder / "study.json")["systems"])
    path = folder / "study" / "design.json"
    asked = {key: value for key, value in wanted.items() if value is not None}
    if asked.get("reference", systems[0]) not in systems:
        raise SettingsError(
            f'There is no system "{asked["reference"]}" in {folder}: {nearest(asked["reference"], systems)}.'
        )
    if path.exists():
        design = Design(**read_json(path))
        for key, value in asked.items():
            if getattr(design, key) != value:
                raise SettingsError(
                    f"Voting in {folder} began with {key} {getattr(design, key)}, and now it is {value}: "
                    f"leave it out, or remove {path.parent} to begin anew."
                )
        return design
    if len(systems) < 2:
        raise DataError(f"{folder} holds one system; voting needs two.")
    design = Design(**{"reference": systems[0], "secret": secrets.token_hex(16), **asked})
    path.parent.mkdir(exist_ok=True)
    replace(path, (design.model_dump_json(indent=1) + "\n").encode())
    return design


def study_items(folder: Path, design: Design) -> list[Item]:
    """Everything that is asked, from the pictures that both systems of a pair have."""
    systems = list(read_json(folder / "study.json")["systems"])
    stems = {name: {row["stem"]: row["index"] for row in read_records(name, folder)} for name in systems}
    others = [name for name in systems if name != design.reference]
    pairs = list(combinations(systems, 2)) if design.all_pairs else [(design.reference, o) for o in others]
    items = [
        Item(question, stem, stems[a][stem], a, b)
        for question in QUESTIONS
        for a, b in pairs
        for stem in sorted(stems[a].keys() & stems[b].keys())
    ]
    if not items:
        raise DataError(f"{folder} holds no two systems with pictures of the same prompts.")
    return items


def counted(rows: Iterable[Row]) -> list[Row]:
    """One vote per voter and item, the last; neither skipped ones nor attention checks."""
    last = {(row["voter"], row["question"], row["stem"], row["a"], row["b"]): row for row in rows}
    return [row for row in last.values() if row["answer"] in ("a", "b", "tie") and row["b"] != CHECK]


def distrusted(rows: Iterable[Row]) -> set[str]:
    """Voters who failed too many attention checks."""
    seen: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["b"] == CHECK and row["answer"] != "skip":
            seen[row["voter"]].append(row["answer"] == "a")
    return {voter for voter, right in seen.items() if sum(right) < TRUSTED * len(right)}


class Poll:
    """A study while votes are being given. Threads may share it; its file has one writer."""

    def __init__(self, folder: Path, design: Design, writer: LineWriter | None = None) -> None:
        self.folder = folder
        self.design = design
        self.items = study_items(folder, design)
        self.prompts = [prompt.prompt for prompt in stored_prompts(folder)]
        self.path = folder / "study" / "votes.jsonl"
        self.rows = list(read_lines(self.path))
        self._writer = writer or LineWriter(self.path)
        self._lock = threading.Lock()
        self._issued: dict[str, Item] = {}
        self._ballots: dict[str, dict[str, Item]] = {}  # of the voter looked up last
        self._checks = list(dict.fromkeys(Item(i.question, i.stem, i.index, i.a, CHECK) for i in self.items))
        self._pictures = {
            self.token(stem, system): (system, stem)
            for stem, system in sorted(
                {(i.stem, s) for i in (*self.items, *self._checks) for s in (i.a, i.b)}
            )
            if system != CHECK
        } | {self.token(i.stem, i.a, CHECK): (i.a, i.stem, CHECK) for i in self._checks}
        self._answered: dict[str, set[str]] = defaultdict(set)
        for row in self.rows:
            self._answered[row["voter"]].add(_row_key(row))
        self._recount()

    def ballot(self, voter: str) -> Ballot | None:
        """The next ballot of a voter; None when everything was asked. Raises RequestError for a bad id."""
        _check_voter(voter)
        with self._lock:
            number = len(self._answered[voter])
            item = self._choose(voter, number)
            if item is None:
                return None
            return self._show(voter, item, number)

    def vote(self, voter: str, ballot: str, answer: str, milliseconds: int = 0) -> None:
        """Record an answer to a ballot that this voter was given; a second answer replaces the first.

        Raises RequestError for an unknown answer or a ballot of someone else.
        """
        _check_voter(voter)
        if answer not in ANSWERS:
            raise RequestError(f'"{answer}" is no answer: {nearest(answer, ANSWERS)}.')
        with self._lock:
            item = self.find(voter, ballot)
            if item is None:
                raise RequestError("This ballot was not given to this voter.")
            self._record(item, voter, voter, answer, milliseconds, "page")

    def take(self, shown_to: str, ballot: str, answer: str, person: str) -> bool:
        """Record the answer of `person` to a ballot drawn for the sheet `shown_to`, unless it is there."""
        with self._lock:
            item = self.find(shown_to, ballot)
            if item is None or item.key in self._answered[person]:
                return False
            self._record(item, shown_to, person, answer, 0, "sheet")
            return True

    def find(self, voter: str, ballot: str) -> Item | None:
        """The item of a ballot of this voter, also of one given out before this process began."""
        item = self._issued.get(ballot)
        if item is not None:
            return item if ballot == self.token(voter, item.key) else None
        if voter not in self._ballots:
            self._ballots = {voter: {self.token(voter, i.key): i for i in (*self.items, *self._checks)}}
        return self._ballots[voter].get(ballot)

    def _record(
        self, item: Item, shown_to: str, person: str, answer: str, milliseconds: int, source: str
    ) -> None:
        sides = ("a", "b") if self._a_is_left(shown_to, item) else ("b", "a")
        said = {"left": sides[0], "right": sides[1]}.get(answer, answer)
        row = {
            "time": round(time.time(), 1),
            "voter": person,
            "question": item.question,
            "stem": item.stem,
            "index": item.index,
            "a": item.a,
            "b": item.b,
            "left": sides[0],
            "answer": said,
            "milliseconds": milliseconds,
            "source": source,
        }
        self._writer.append(row)
        again = item.key in self._answered[person]
        self.rows.append(row)
        self._answered[person].add(item.key)
        if item.is_check or again:
            self._recount()
        elif said != "skip" and person not in self._out:
            self._counts[item.key] += 1

    def picture(self, token: str) -> tuple[Path, bool] | None:
        """The file of a picture token and whether it is to be degraded; None for an unknown token."""
        found = self._pictures.get(token)
        if found is None:
            return None
        return self.folder / "pictures" / found[0] / f"{found[1]}.png", len(found) == 3

    def show(self, voter: str, item: Item) -> Ballot:
        """The ballot of a given item, for sheets that are filled in elsewhere."""
        return self._show(voter, item, 0)

    def progress(self) -> tuple[int, int]:
        """Votes that count towards the wanted raters of each pair, and how many are wanted."""
        wanted = self.design.raters
        return sum(min(wanted, self._counts[item.key]) for item in self.items), wanted * len(self.items)

    def token(self, *parts: str) -> str:
        """A name that tells nothing without the secret."""
        text = json.dumps(parts).encode()
        return hmac.new(self.design.secret.encode(), text, hashlib.sha256).hexdigest()[:24]

    def close(self) -> None:
        self._writer.close()

    def _choose(self, voter: str, number: int) -> Item | None:
        answered = self._answered[voter]
        questions = sorted(QUESTIONS, key=lambda name: self.token(voter, name))
        block = number // max(1, self.design.session // len(questions)) % len(questions)
        wanted = [questions[block], *(name for name in questions if name != questions[block])]
        if number % self.design.check_every == self._check_place(voter, number):
            checks = [
                item for item in self._checks if item.question == wanted[0] and item.key not in answered
            ]
            if checks:
                return min(checks, key=lambda item: self.token(voter, "order", item.key))
        left = {q: [i for i in self.items if i.question == q and i.key not in answered] for q in wanted}
        fewest = {q: min((self._counts[i.key] for i in left[q]), default=0) for q in wanted}
        # A question that has its voters waits for the other one.
        for question in sorted(wanted, key=lambda q: fewest[q] >= self.design.raters):
            few = [i for i in left[question] if self._counts[i.key] == fewest[question]]
            if few:
                return min(few, key=lambda item: self.token(voter, "order", item.key))
        return None

    def _check_place(self, voter: str, number: int) -> int:
        """Which ballot of each run of `check_every` is the attention check."""
        every = self.design.check_every
        return int(self.token(voter, "check", str(number // every)), 16) % every

    def _show(self, voter: str, item: Item, number: int) -> Ballot:
        ballot = self.token(voter, item.key)
        self._issued[ballot] = item
        first = self.token(item.stem, item.a)
        second = self.token(item.stem, item.a, CHECK) if item.is_check else self.token(item.stem, item.b)
        left, right = (first, second) if self._a_is_left(voter, item) else (second, first)
        return Ballot(
            id=ballot,
            question=item.question,
            text=QUESTIONS[item.question],
            prompt=self.prompts[item.index] if item.question == "alignment" else None,
            left=left,
            right=right,
            number=number % self.design.session + 1,
            session=self.design.session,
        )

    def _a_is_left(self, voter: str, item: Item) -> bool:
        return int(self.token(voter, "side", item.key), 16) % 2 == 0

    def _recount(self) -> None:
        self._out = distrusted(self.rows)
        self._counts = Counter(_row_key(row) for row in counted(self.rows) if row["voter"] not in self._out)


def _row_key(row: Row) -> str:
    return "/".join((row["question"], row["stem"], row["a"], row["b"]))


def _check_voter(voter: str) -> None:
    if not VOTER.fullmatch(voter):
        raise RequestError("A voter's id has 8 to 64 letters, digits, dashes or underscores.")
