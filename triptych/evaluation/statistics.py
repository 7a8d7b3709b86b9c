"""Statistics of votes and of paired measurements, as plain functions of numbers.

Shares have Wilson intervals (`metrics.wilson`) where votes are independent, and bootstrap intervals over
prompts where one prompt has several votes. Ties count as half a win for both sides throughout.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from triptych.evaluation.metrics import Z95, Estimate, wilson

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 2000
BLOCK = 250  # resamples drawn at once, which bounds the memory
ITERATIONS, TOLERANCE = 10_000, 1e-10
LEVEL, POWER = 0.95, 0.80


@dataclass(frozen=True)
class Tally:
    """Votes of one comparison, seen from the first side."""

    wins: int = 0
    ties: int = 0
    losses: int = 0

    @property
    def votes(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def score(self) -> float:
        """Wins, and half of the ties."""
        return self.wins + self.ties / 2


def win_rate(tally: Tally) -> Estimate:
    """The share won, ties as half, with its Wilson interval: for votes on different prompts."""
    return wilson(tally.score, tally.votes)


def bootstrap_rate(groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of all values with an interval that resamples whole groups [Efron 1979; Field 2007].

    One group holds the votes (1 won, 0.5 tied, 0 lost) on one prompt: they are alike, so the number of
    prompts decides how sure the mean is, more than the number of votes. Percentiles 2.5 and 97.5; a single
    group tells nothing about others, and has the interval [0, 1] of a share.
    """
    filled = [group for group in groups if len(group)]
    count = sum(len(group) for group in filled)
    if count == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    sums = np.array([math.fsum(group) for group in filled])
    sizes = np.array([len(group) for group in filled], dtype=np.float64)
    value = float(sums.sum() / sizes.sum())
    if len(filled) == 1:
        return Estimate(value, 0.0, 1.0, count)
    rng = np.random.default_rng(seed)
    means: list[Array] = []
    for start in range(0, resamples, BLOCK):
        number = min(BLOCK, resamples - start)
        times = rng.multinomial(len(filled), np.full(len(filled), 1 / len(filled)), size=number)
        means.append((times @ sums) / (times @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of b - a over the same prompts, with a Student interval; `value > 0` when b is larger.

    Pairing takes out what makes a prompt hard for both. Raises ValueError for different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"Pairs need equally many values, got {len(a)} and {len(b)}.")
    gaps = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    if len(gaps) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(gaps.mean())
    if len(gaps) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = student_quantile(len(gaps) - 1) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return Estimate(mean, mean - half, mean + half, len(gaps))


def paired_shares(a: Sequence[bool], b: Sequence[bool]) -> Estimate:
    """The share of b less the share of a, over the same pictures, with the interval of Agresti and Min.

    Half a picture is added to each of the four outcomes [Agresti 2005, section 3.1], so that a few pictures
    on which both agree are not taken for proof that they always do.
    """
    if len(a) != len(b):
        raise ValueError(f"Pairs need equally many values, got {len(a)} and {len(b)}.")
    if not a:
        return Estimate(math.nan, -1.0, 1.0, 0)
    better = sum(y and not x for x, y in zip(a, b, strict=True))
    worse = sum(x and not y for x, y in zip(a, b, strict=True))
    up, down, total = better + 0.5, worse + 0.5, len(a) + 2
    centre = (up - down) / total
    half = Z95 * math.sqrt((up + down) - (up - down) ** 2 / total) / total
    return Estimate((better - worse) / len(a), max(-1.0, centre - half), min(1.0, centre + half), len(a))


def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """The point that leaves (1 - level) / 2 of Student's distribution above it.

    Found by bisection of the distribution's closed sum over its degrees of freedom [Abramowitz 26.7.3-4].
    """
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if _student_middle(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_middle(t: float, freedom: int) -> float:
    """The probability between -t and t."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2 == 1
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (theta + (sine * total if freedom > 1 else 0.0))
    return sine * total


def bradley_terry(wins: Array, prior: float = 0.0) -> Array:
    """Strengths (n,), geometric mean 1, from wins (n,n): `wins[i, j]` is how often i beat j.

    P(i beats j) = s_i / (s_i + s_j), most likely strengths by Hunter's iteration [Hunter 2004, eq. 3]. With
    a tie half a win goes to both. `prior` adds so many wins to both sides of every pair; without it, raises
    ValueError when some group of competitors never lost to the others, for then no strengths are likeliest.
    """
    count = len(wins)
    won = np.asarray(wins, dtype=np.float64) + prior * (1 - np.eye(count))
    if not _connected(won):
        raise ValueError("Some competitors never lost to the others: give a prior, or gather more votes.")
    played = won + won.T
    total = won.sum(1)
    strengths = np.ones(count)
    for _ in range(ITERATIONS):
        new = total / (played / (strengths[:, None] + strengths[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / strengths)).max() < TOLERANCE:
            return new
        strengths = new
    return strengths


def _connected(won: Array) -> bool:
    """Whether from every competitor a chain of wins leads to every other."""
    reach = (won > 0) | np.eye(len(won), dtype=bool)
    for _ in range(len(won)):
        reach = reach | (reach.astype(int) @ reach.astype(int) > 0)
    return bool(reach.all())


def fleiss_kappa(table: Sequence[Sequence[int]]) -> float:
    """Agreement beyond chance of equally many voters a subject: 1 complete, 0 as by chance [Fleiss 1971].

    `table[i][j]` voters put subject i into category j. Raises ValueError when subjects have different
    numbers of voters (see `krippendorff_alpha`). NaN when all votes fell into one category.
    """
    counts = np.asarray(table, dtype=np.float64)
    voters = counts.sum(1)
    if len(counts) == 0 or voters.min() != voters.max() or voters[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of voters, at least 2, for every subject.")
    n = voters[0]
    agreed = float(((counts**2).sum(1) - n).mean() / (n * (n - 1)))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return math.nan if chance == 1 else (agreed - chance) / (1 - chance)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Agreement beyond chance of any number of voters a unit, for names [Krippendorff 2011, section C].

    `units[i]` holds the answers on unit i; units with fewer than two say nothing. NaN when nothing can be
    said: no such unit, or all answers the same.
    """
    told = [unit for unit in units if len(unit) >= 2]
    names = {name: index for index, name in enumerate(sorted({v for unit in told for v in unit}, key=str))}
    if len(names) < 2:
        return math.nan
    counts = np.zeros((len(told), len(names)))
    for row, unit in zip(counts, told, strict=True):
        for answer in unit:
            row[names[answer]] += 1
    voters = counts.sum(1)
    all_answers = counts.sum()
    # Pairs of answers within a unit that differ, each unit weighed by its answers.
    observed = float(((voters**2 - (counts**2).sum(1)) / (voters - 1)).sum() / all_answers)
    expected = float((all_answers**2 - (counts.sum(0) ** 2).sum()) / (all_answers * (all_answers - 1)))
    return 1 - observed / expected


def votes_needed(share: float, against: float = 0.5, level: float = LEVEL, power: float = POWER) -> int:
    """How many independent votes tell `share` from `against` [Fleiss 2003, eq. 2.8; no continuity term].

    A two-sided test at `level` finds the difference with probability `power`.

    >>> votes_needed(0.53)
    2178
    """
    if not (0 < share < 1 and 0 < against < 1) or share == against:
        raise ValueError(f"Two different shares between 0 and 1 were expected, got {share} and {against}.")
    z_level, z_power = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(power)
    spread = z_level * math.sqrt(against * (1 - against)) + z_power * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - against)) ** 2 - 1e-9)


def votes_for_interval(half_width: float, share: float = 0.5) -> int:
    """The fewest votes at which the Wilson interval around `share` is at most `half_width` to each side."""
    if not 0 < half_width < 0.5:
        raise ValueError(f"Half the width of an interval is between 0 and 0.5, got {half_width}.")
    low, high = 1, math.ceil(Z95**2 / half_width**2) + 10
    while low < high:
        middle = (low + high) // 2
        estimate = wilson(share * middle, middle)
        if (estimate.high - estimate.low) / 2 <= half_width:
            high = middle
        else:
            low = middle + 1
    return low


def design_effect(groups: Sequence[Sequence[float]]) -> float:
    """By how much votes on the same prompts are worth less than independent ones [Kish 1965]: 1 is nothing.

    The variance of the mean with prompts as units, over that of as many independent votes; never below 1.
    """
    filled = [group for group in groups if len(group)]
    votes = (
        np.concatenate([np.asarray(group, dtype=np.float64) for group in filled]) if filled else np.zeros(0)
    )
    if len(filled) < 2 or votes.var() == 0:
        return 1.0
    gaps = np.array([sum(group) - len(group) * votes.mean() for group in filled])
    clustered = (gaps**2).sum() / len(votes) ** 2 * len(filled) / (len(filled) - 1)
    return max(1.0, float(clustered / (votes.var() / len(votes))))
