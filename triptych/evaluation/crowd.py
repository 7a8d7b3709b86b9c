"""Voting elsewhere: a sheet of ballots as CSV with a folder of pictures, and the answers read back.

Each ballot stands on the sheet once for every wanted rater, under a rater's number; rows of one number are
for one person. The answer column takes left, right, tie or skip (or 1, 2, 0). Whoever answers is kept only as
a keyed hash of what the sheet's `voter` column says.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from triptych.errors import DataError, RequestError
from triptych.evaluation.ballots import ANSWERS, CHECK, Item, Poll
from triptych.evaluation.shown import shown_png
from triptych.images import replace

COLUMNS = ("ballot", "rater", "question", "prompt", "left", "right", "answer", "voter")
SHORT = {
    "1": "left",
    "2": "right",
    "0": "tie",
    "3": "tie",
    "": "",
    "l": "left",
    "r": "right",
    "t": "tie",
    "s": "skip",
}


def write_sheet(poll: Poll, target: Path) -> int:
    """Write TARGET/sheet.csv and TARGET/pictures for all ballots of all raters; how many rows there are.

    Every rater's rows are in an order of their own, with attention checks among them. The columns left and
    right name files of TARGET/pictures.
    """
    pictures = target / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows, shown = [], set()
    for rater in range(1, poll.design.raters + 1):
        voter = sheet_voter(poll, rater)
        for item in _order(poll, voter):
            ballot = poll.show(voter, item)
            shown |= {ballot.left, ballot.right}
            names = (f"pictures/{ballot.left}.png", f"pictures/{ballot.right}.png")
            rows.append((ballot.id, rater, ballot.text, ballot.prompt or "", *names, "", ""))
    for token in sorted(shown):
        path, degraded = poll.picture(token) or (Path(), False)
        replace(pictures / f"{token}.png", shown_png(path, degraded))
    with open(target / "sheet.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return len(rows)


@dataclass(frozen=True)
class Imported:
    """What became of a sheet's rows."""

    votes: int
    unanswered: int
    known: int  # were imported before


def read_sheet(poll: Poll, path: Path) -> Imported:
    """Take the answers of a filled-in sheet; importing a sheet again adds nothing.

    Raises DataError naming the row for an unknown answer or ballot; then nothing of the sheet is taken.
    """
    given, unanswered = [], 0
    raters = {str(number): sheet_voter(poll, number) for number in range(1, poll.design.raters + 1)}
    for number, row in enumerate(_rows(path), start=2):
        said = (row.get("answer") or "").strip().lower()
        answer = SHORT.get(said, said)
        if not answer:
            unanswered += 1
            continue
        voter = raters.get((row.get("rater") or "").strip())
        ballot = (row.get("ballot") or "").strip()
        if answer not in ANSWERS:
            raise DataError(
                f'{path}, row {number}: "{said}" is no answer; left, right, tie or skip was expected.'
            )
        if voter is None or poll.find(voter, ballot) is None:
            raise DataError(f"{path}, row {number}: there is no such ballot for this rater in this study.")
        person = (row.get("voter") or "").strip()
        given.append((voter, ballot, answer, poll.token("person", person) if person else ""))
    votes = known = 0
    for voter, ballot, answer, person in given:
        fresh = poll.take(voter, ballot, answer, person or voter)
        votes, known = votes + fresh, known + (not fresh)
    return Imported(votes, unanswered, known)


def sheet_voter(poll: Poll, rater: int) -> str:
    """The voter's id under which a rater's sides and order are drawn."""
    return f"sheet-{poll.token('sheet', str(rater))[:12]}"


def _order(poll: Poll, voter: str) -> list[Item]:
    """All items question by question, each in the voter's order, with one check in every `check_every`."""
    ordered: list[Item] = []
    checks: set[str] = set()
    for question in dict.fromkeys(item.question for item in poll.items):
        own = sorted(
            (item for item in poll.items if item.question == question),
            key=lambda item: poll.token(voter, "order", item.key),
        )
        every = poll.design.check_every - 1
        for start in range(0, len(own), every):
            part = own[start : start + every]
            first = part[0]
            place = int(poll.token(voter, "check", first.key), 16) % (len(part) + 1)
            check = Item(question, first.stem, first.index, first.a, CHECK)
            if check.key not in checks:
                checks.add(check.key)
                part.insert(place, check)
            ordered += part
    return ordered


def _rows(path: Path) -> list[dict[str, str | None]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows = list(table)
            names = set(table.fieldnames or ())
    except FileNotFoundError:
        raise DataError(f"No such sheet: {path}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} cannot be read as a sheet: {error}.") from None
    lost = {"ballot", "rater", "answer"} - names
    if lost:
        raise DataError(f"{path} has no column {sorted(lost)[0]}; {', '.join(COLUMNS)} were expected.")
    return rows
