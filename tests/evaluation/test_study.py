"""Voting: blind ballots, votes that stay, and results that find what simulated voters were told to think."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.cli.main import run
from triptych.errors import DataError, RequestError, SettingsError
from triptych.evaluation import crowd
from triptych.evaluation.ballots import CHECK, QUESTIONS, Ballot, Poll, open_design, study_items
from triptych.evaluation.compare import compare
from triptych.evaluation.lines import read_lines
from triptych.evaluation.report import write_report
from triptych.evaluation.shown import degrade, shown_png
from triptych.evaluation.statistics import votes_needed
from triptych.evaluation.study import PUBLISHED, outcome, plan
from triptych.evaluation.study_file import read_study

COLOURS = {"stable-cascade": (200, 30, 30), "sdxl": (30, 160, 30), "weak": (30, 30, 200)}


def comparison(folder: Path, prompts: int = 12) -> Path:
    """A finished comparison of three systems whose pictures are known by their colour."""
    lines = [
        f'{{"prompt": "prompt {i}", "category": "{"even" if i % 2 == 0 else "odd"}"}}' for i in range(prompts)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    tables = []
    for name, (red, green, blue) in COLOURS.items():
        (folder / name).mkdir()
        for index in range(prompts):
            Image.new("RGB", (40, 32), (red, green, blue + index)).save(folder / name / f"{index:05d}.png")
        tables.append(f'[[systems]]\nname = "{name}"\nfolder = "{{here}}/{name}"\n')
    (folder / "study.toml").write_text('prompts = "{here}/prompts.jsonl"\n' + "\n".join(tables))
    out = folder / "out"
    assert compare(read_study(folder / "study.toml"), out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison(tmp_path)


def system_of(poll: Poll, token: str) -> str:
    """Which system drew a picture, or CHECK for a degraded twin: what a voter's eye would tell."""
    path, degraded = poll.picture(token) or (Path(), False)
    return CHECK if degraded else path.parent.name


def session(poll: Poll, voter: str, votes: int, eye) -> list[Ballot]:
    """Let a voter answer; `eye(left, right, ballot)` says what."""
    seen = []
    for _ in range(votes):
        ballot = poll.ballot(voter)
        if ballot is None:
            break
        seen.append(ballot)
        poll.vote(voter, ballot.id, eye(system_of(poll, ballot.left), system_of(poll, ballot.right), ballot))
    return seen


def careful(strengths: dict[str, float], rng: random.Random, ties: float = 0.0):
    """A voter who sees degraded twins and else chooses by Bradley-Terry strengths."""

    def eye(left: str, right: str, ballot: Ballot) -> str:
        if CHECK in (left, right):
            return "right" if left == CHECK else "left"
        if rng.random() < ties:
            return "tie"
        chance = strengths[left] / (strengths[left] + strengths[right])
        return "left" if rng.random() < chance else "right"

    return eye


def test_ballots_hide_everything_but_what_is_asked(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    seen = session(poll, "voter-000001", 80, lambda *_: "tie")
    text = json.dumps([ballot.__dict__ for ballot in seen])
    assert not any(name in text for name in COLOURS)
    for ballot in seen:
        assert (ballot.prompt is None) == (ballot.question == "looks")
    assert len({ballot.id for ballot in seen}) == len(seen)
    poll.close()


def test_the_two_questions_are_asked_apart_and_one_in_ten_is_a_check(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    seen = session(poll, "voter-000001", 40, lambda *_: "tie")
    changes = sum(a.question != b.question for a, b in pairwise(seen))
    assert changes == 1
    assert Counter(ballot.question for ballot in seen) == {"alignment": 20, "looks": 20}
    checks = [CHECK in (system_of(poll, b.left), system_of(poll, b.right)) for b in seen]
    assert [sum(checks[start : start + 10]) for start in (0, 10, 20, 30)] == [1, 1, 1, 1]
    poll.close()


def test_sides_and_order_differ_between_voters(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    first = [session(poll, f"voter-{n:06d}", 1, lambda *_: "skip")[0] for n in range(40)]
    left = Counter(system_of(poll, ballot.left) == "stable-cascade" for ballot in first)
    assert 8 < left[True] < 32
    assert len({(b.left, b.right) for b in first}) > 10
    poll.close()


def test_every_pair_gets_its_voters_before_any_gets_more(folder: Path) -> None:
    poll = Poll(folder, open_design(folder, raters=2, secret="0" * 32))
    items = study_items(folder, open_design(folder))
    assert len(items) == 2 * 2 * 12
    number = 0
    while poll.progress()[0] < poll.progress()[1]:
        session(poll, f"voter-{number:06d}", 12, careful(dict.fromkeys(COLOURS, 1.0), random.Random(number)))
        number += 1
        assert number < 20
    votes = Counter((r["question"], r["stem"], r["b"]) for r in poll.rows if r["b"] != CHECK)
    assert len(votes) == len(items)
    assert set(votes.values()) <= {2, 3}
    poll.close()


def test_votes_stay_when_the_page_ends_and_two_pages_cannot_mix(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    ballot = poll.ballot("voter-000001")
    with pytest.raises(DataError, match="another process"):
        Poll(folder, open_design(folder))
    poll.close()
    again = Poll(folder, open_design(folder))
    again.vote("voter-000001", ballot.id, "left", 1200)  # given out before, answered after
    following = again.ballot("voter-000001")
    again.close()
    third = Poll(folder, open_design(folder))
    assert third.ballot("voter-000001") == following
    (row,) = read_lines(folder / "study" / "votes.jsonl")
    assert (row["voter"], row["milliseconds"], row["source"]) == ("voter-000001", 1200, "page")
    third.close()


def test_a_ballot_belongs_to_its_voter(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    ballot = poll.ballot("voter-000001")
    for voter, token, answer, message in (
        ("voter-000002", ballot.id, "left", "not given to this voter"),
        ("voter-000001", "0" * 24, "left", "not given to this voter"),
        ("voter-000001", ballot.id, "lefft", 'did you mean "left"'),
        ("x", ballot.id, "left", "8 to 64 letters"),
    ):
        with pytest.raises(RequestError, match=message):
            poll.vote(voter, token, answer)
    assert poll.rows == []
    poll.close()


def test_results_find_what_voters_think(tmp_path: Path) -> None:
    folder = comparison(tmp_path, prompts=40)
    strengths = {"stable-cascade": 2.0, "sdxl": 1.0, "weak": 0.4}
    poll = Poll(folder, open_design(folder, all_pairs=True, raters=3, secret="1" * 32))
    rng = random.Random(3)
    for number in range(24):
        session(poll, f"voter-{number:06d}", 40, careful(strengths, rng, ties=0.1))
    for number in range(6):  # these press anything
        session(poll, f"lazy-{number:08d}", 40, lambda *_: rng.choice(("left", "right")))
    poll.close()
    found = outcome(folder)
    assert found.voters == 30
    assert set(found.excluded) <= {f"lazy-{n:08d}" for n in range(6)}
    assert len(found.excluded) >= 4
    for verdict in found.verdicts:
        duel = next(d for d in verdict.duels if (d.a, d.b) == ("stable-cascade", "sdxl"))
        truth = 0.05 + 0.9 * 2 / 3
        assert duel.rate.low < truth < duel.rate.high
        assert duel.published == PUBLISHED[verdict.question]["sdxl"]
        assert duel.tally.ties > 0
        assert set(duel.categories) == {"even", "odd"}
        assert duel.more_votes > 0
        ratio = verdict.strengths["stable-cascade"].value / verdict.strengths["weak"].value
        assert 2 < ratio < 9  # ties pull 5 towards 1
        assert list(verdict.strengths) == ["sdxl", "stable-cascade", "weak"]
        assert verdict.enough_raters[0] == verdict.enough_raters[1] == 120
        assert abs(verdict.agreement) < 0.2  # they differ as chance has it, prompts being alike
    path = write_report(found, folder)
    report = path.read_text(encoding="utf-8")
    assert report.count("<svg") == 4  # two questions, each with two first systems
    assert "published 56.1 %" in report
    assert not re.search(r"(src|href)=|@import|<script|https?://(?!www.w3.org)", report)
    assert json.loads((folder / "study" / "results.json").read_text())["votes"] == found.votes


def test_voters_who_agree_are_seen_to(folder: Path) -> None:
    poll = Poll(folder, open_design(folder))
    order = list(COLOURS)

    def eye(left: str, right: str, ballot: Ballot) -> str:
        if CHECK in (left, right):
            return "right" if left == CHECK else "left"
        even = int((ballot.prompt or "prompt 0").split()[1]) % 2 == 0 and ballot.question == "alignment"
        better = order.index(left) < order.index(right)
        return "left" if better != even else "right"

    for number in range(4):
        session(poll, f"voter-{number:06d}", 60, eye)
    poll.close()
    alignment, looks = outcome(folder).verdicts
    assert alignment.agreement == 1
    assert alignment.duels[0].effect > 2  # all voters of a prompt say the same
    assert alignment.duels[0].categories["odd"].value == 1
    assert alignment.duels[0].categories["even"].value == 0
    assert looks.duels[0].rate.value == 1
    assert looks.strengths["stable-cascade"].value > looks.strengths["weak"].value


def test_a_sheet_goes_out_and_comes_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "crowd"
    assert run(["study", str(folder), "--sheet", str(target)]) == 0
    poll = Poll(folder, open_design(folder))
    with open(target / "sheet.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert not any(name in (target / "sheet.csv").read_text() for name in COLOURS)
    assert all(51 <= count <= 54 for count in Counter(row["rater"] for row in rows).values())
    rng = random.Random(0)
    for row in rows:
        assert (target / row["left"]).is_file()
        tokens = [Path(row[side]).stem for side in ("left", "right")]
        # The order of a study is drawn anew each time, so the answers must hardly be left to chance.
        eye = careful({"stable-cascade": 50.0, "sdxl": 1.0, "weak": 1.0}, rng)
        said = eye(*(system_of(poll, token) for token in tokens), None)
        row["answer"] = {"left": "1", "right": "Right"}[said]
        row["voter"] = f"worker {row['rater']} <mail@example.org>"
    rows[0]["answer"] = ""
    poll.close()
    with open(tmp_path / "back.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, crowd.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    taken = f"{len(rows) - 1} votes taken, 1 rows without an answer, 0 known"
    for expected in (taken, "0 votes taken, 1 rows without"):
        assert run(["study", str(folder), "--import", str(tmp_path / "back.csv")]) == 0
        assert expected in capsys.readouterr().out
    assert "example.org" not in (folder / "study" / "votes.jsonl").read_text()
    found = outcome(folder)
    assert (found.voters, found.excluded) == (3, [])
    assert found.verdicts[0].duels[0].rate.low > 0.5
    rows[1]["answer"] = "both"
    with open(tmp_path / "bad.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, crowd.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert run(["study", str(folder), "--import", str(tmp_path / "bad.csv")]) == 2
    assert 'row 3: "both" is no answer' in capsys.readouterr().err


def test_the_plan_says_what_votes_can_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", str(folder), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "2 pairs of systems, 12 pictures each, 2 questions, 3 voters a pair: 144 votes" in said
    assert f"takes {votes_needed(0.53)} votes a pair and question: not enough" in said
    assert plan(folder, open_design(folder))


def test_a_report_without_votes_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", str(folder), "--report", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["votes"] == 0
    assert "No votes yet" in Path(told["report"]).read_text()


def test_a_design_is_kept(folder: Path, tmp_path: Path) -> None:
    open_design(folder, reference="sdxl", raters=4)
    assert open_design(folder).raters == 4
    with pytest.raises(SettingsError, match="began with raters 4, and now it is 5"):
        open_design(folder, raters=5)
    with pytest.raises(SettingsError, match=r'no system "sdx".*did you mean "sdxl"'):
        open_design(folder, reference="sdx")
    with pytest.raises(DataError, match="holds no comparison"):
        open_design(tmp_path)
    assert run(["study", str(folder), "--report", "--plan"]) == 2


def test_pictures_shown_keep_their_pixels_and_nothing_else(tmp_path: Path) -> None:
    from triptych.images import save_png

    image = Image.effect_noise((64, 48), 80).convert("RGB")
    path = save_png(tmp_path, "p", image, {"system": "stable-cascade"})
    shown = shown_png(path)
    assert b"stable-cascade" in path.read_bytes()
    assert b"stable-cascade" not in shown
    (tmp_path / "shown.png").write_bytes(shown)
    assert Image.open(tmp_path / "shown.png").tobytes() == image.tobytes()
    twin = degrade(image)
    assert twin.size == image.size
    assert len(twin.getcolors(10_000)) <= 20 * 20
    assert list(QUESTIONS) == ["alignment", "looks"]
