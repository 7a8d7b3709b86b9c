"""From votes to results: win rates with intervals, strengths, agreement, and what is still to be done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.evaluation.ballots import (
    CHECK,
    QUESTIONS,
    Design,
    counted,
    distrusted,
    open_design,
    study_items,
)
from triptych.evaluation.compare import read_json, stored_prompts
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate, amount
from triptych.evaluation.statistics import (
    Tally,
    bootstrap_rate,
    bradley_terry,
    design_effect,
    krippendorff_alpha,
    votes_for_interval,
    votes_needed,
    win_rate,
)

# The announcement of Stable Cascade: share of votes for it, by question and competitor.
PUBLISHED = {
    "alignment": {"playground-v2": 0.530, "sdxl-turbo": 0.617, "sdxl": 0.561, "wuerstchen-v2": 0.752},
    "looks": {"playground-v2": 0.475, "sdxl-turbo": 0.849, "sdxl": 0.707, "wuerstchen-v2": 0.784},
}
PUBLISHED_REFERENCE = "stable-cascade"
WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}
STRENGTH_PRIOR = 0.5  # half a win to both sides of every pair, so that a clean sweep has finite strengths
STRENGTH_RESAMPLES = 200
INTERVAL = 0.03  # half the width that "votes still needed" aims at

Row = dict[str, Any]


@dataclass
class Duel:
    """What was voted between the reference, or the first of a pair, and another system."""

    a: str
    b: str
    tally: Tally
    rate: Estimate  # interval by bootstrap over prompts
    wilson: Estimate  # interval as if votes were independent
    categories: dict[str, Estimate] = field(default_factory=dict)
    effect: float = 1.0  # by how much votes on the same prompts are worth less
    more_votes: int = 0  # until the interval is INTERVAL to each side
    published: float | None = None


@dataclass
class Verdict:
    """The answers to one question."""

    question: str
    duels: list[Duel]
    strengths: dict[str, Estimate]  # Bradley-Terry, geometric mean 1
    agreement: float  # Krippendorff's alpha; NaN when it cannot be told
    enough_raters: tuple[int, int]  # items with the wanted number of voters, and items in all


@dataclass
class Outcome:
    """Everything a study says."""

    name: str
    reference: str
    verdicts: list[Verdict]
    voters: int
    excluded: list[str]
    votes: int
    skipped: int


def outcome(folder: Path) -> Outcome:
    """The results of the votes in FOLDER/study/votes.jsonl. Raises DataError when there is no comparison."""
    design = open_design(folder)
    study = read_json(folder / "study.json")
    rows = list(read_lines(folder / "study" / "votes.jsonl"))
    excluded = distrusted(rows)
    votes = [row for row in counted(rows) if row["voter"] not in excluded]
    categories = [prompt.category for prompt in stored_prompts(folder)]
    items = study_items(folder, design)
    verdicts = []
    for question in QUESTIONS:
        asked = list(dict.fromkeys((item.a, item.b) for item in items if item.question == question))
        own = [row for row in votes if row["question"] == question]
        duels = [_duel(a, b, own, categories, study["systems"], question) for a, b in asked]
        by_item = _grouped(own, lambda row: (row["stem"], row["a"], row["b"]))
        whole = sum(len(group) >= design.raters for group in by_item.values())
        answers = [[row["answer"] for row in group] for group in by_item.values()]
        counts = (whole, sum(item.question == question for item in items))
        alpha = krippendorff_alpha(answers)
        verdicts.append(Verdict(question, duels, _strengths(own), alpha, counts))
    skipped = sum(row["answer"] == "skip" and row["b"] != CHECK for row in rows)
    voters = len({row["voter"] for row in rows})
    name = study["name"] or folder.name
    return Outcome(name, design.reference, verdicts, voters, sorted(excluded), len(votes), skipped)


def _duel(
    a: str, b: str, votes: Sequence[Row], categories: Sequence[str], systems: dict[str, Row], question: str
) -> Duel:
    own = [row for row in votes if (row["a"], row["b"]) == (a, b)]
    said = [row["answer"] for row in own]
    tally = Tally(said.count("a"), said.count("tie"), said.count("b"))
    groups = _worths(own)
    effect = design_effect(groups)
    duel = Duel(a, b, tally, bootstrap_rate(groups), win_rate(tally), effect=effect)
    kinds = _grouped(own, lambda row: categories[row["index"]])
    if len(kinds) > 1:
        duel.categories = {kind or "other": bootstrap_rate(_worths(kinds[kind])) for kind in sorted(kinds)}
    wanted = votes_for_interval(INTERVAL, duel.rate.value if tally.votes else 0.5)
    duel.more_votes = max(0, round(wanted * effect) - tally.votes)
    if _is_published(systems.get(a, {}), a):
        preset = systems.get(b, {}).get("preset", b)
        duel.published = PUBLISHED[question].get(preset)
    return duel


def _is_published(settings: Row, name: str) -> bool:
    """Whether a system is the model of the announcement."""
    return PUBLISHED_REFERENCE in (settings.get("preset"), name) or settings.get("model") == "cascade"


def _worths(votes: Sequence[Row]) -> list[list[float]]:
    """What votes are worth to `a`, by prompt."""
    groups = _grouped(votes, lambda row: row["index"])
    return [[WORTH[row["answer"]] for row in group] for group in groups.values()]


def _strengths(votes: Sequence[Row]) -> dict[str, Estimate]:
    """Bradley-Terry strengths of all systems with votes, intervals by bootstrap over prompts."""
    names = sorted({row[side] for row in votes for side in "ab"})
    if len(names) < 2:
        return {}
    place = {name: number for number, name in enumerate(names)}
    groups = list(_grouped(votes, lambda row: row["index"]).values())
    wins = np.zeros((len(groups), len(names), len(names)))
    for number, group in enumerate(groups):
        for row in group:
            worth, a, b = WORTH[row["answer"]], place[row["a"]], place[row["b"]]
            wins[number, a, b] += worth
            wins[number, b, a] += 1 - worth
    # The prior acts only where there are votes: two systems that never met stay unconnected otherwise.
    prior = STRENGTH_PRIOR * ((wins + wins.transpose(0, 2, 1)).sum(0) > 0)
    try:
        found = bradley_terry(wins.sum(0) + prior)
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=STRENGTH_RESAMPLES)
        again = np.array([bradley_terry(np.tensordot(times, wins, 1) + prior) for times in drawn])
    except ValueError:
        return {}
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    counts = (wins + wins.transpose(0, 2, 1)).sum((0, 2))
    return {
        name: Estimate(float(found[i]), float(low[i]), float(high[i]), int(counts[i]))
        for name, i in place.items()
    }


def _grouped(rows: Sequence[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def plan(folder: Path, design: Design) -> list[str]:
    """What the study can find out, in sentences: votes it will have, and votes that differences need."""
    items = study_items(folder, design)
    pairs = list(dict.fromkeys((item.a, item.b) for item in items))
    each = len(items) // (len(QUESTIONS) * len(pairs))
    votes = each * design.raters
    width = next((w for w in range(1, 50) if votes_for_interval(w / 100) <= votes), 50)
    checks = -(-len(items) * design.raters // design.check_every)
    total = len(items) * design.raters + checks
    said = [
        f"{amount(len(pairs), 'pair')} of systems, {amount(each, 'picture')} each, "
        f"{len(QUESTIONS)} questions, {amount(design.raters, 'voter')} a pair: "
        f"{len(items) * design.raters} votes and about {amount(checks, 'attention check')}, "
        f"{amount(-(-total // design.session), 'session')} of {design.session}.",
        f"Each win rate will rest on {votes} votes: about ± {width} points, more if votes on one prompt are "
        "alike.",
    ]
    for share in (0.53, 0.55, 0.60):
        needed = votes_needed(share)
        said.append(
            f"To tell {share:.0%} from 50 % (95 % sure, 80 % of the time) takes {needed} votes a pair and "
            f"question: {'enough' if votes >= needed else 'not enough'} here."
        )
    return said
