"""Statistics against closed forms, independent packages, and simulations whose truth is known."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from triptych.evaluation.metrics import wilson
from triptych.evaluation.statistics import (
    Tally,
    bootstrap_rate,
    bradley_terry,
    design_effect,
    fleiss_kappa,
    krippendorff_alpha,
    paired_difference,
    paired_shares,
    student_quantile,
    votes_for_interval,
    votes_needed,
    win_rate,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    choix = pytest.importorskip("choix")
    power = pytest.importorskip("statsmodels.stats.power")
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    proportion = pytest.importorskip("statsmodels.stats.proportion")


def test_a_tie_is_half_a_win() -> None:
    tally = Tally(wins=4, ties=2, losses=4)
    assert (tally.votes, tally.score) == (10, 5)
    assert win_rate(tally) == wilson(5, 10)


@pytest.mark.parametrize(("wins", "votes"), [(0, 7), (3, 7), (53, 100), (1154, 2178)])
def test_win_rates_have_the_intervals_of_statsmodels(wins: int, votes: int) -> None:
    ours = win_rate(Tally(wins, 0, votes - wins))
    theirs = proportion.proportion_confint(wins, votes, method="wilson")
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-6)


def test_the_bootstrap_of_single_votes_agrees_with_wilson_and_with_scipy() -> None:
    rng = np.random.default_rng(1)
    votes = rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=400)
    ours = bootstrap_rate([[v] for v in votes], resamples=4000)
    assert ours.value == pytest.approx(votes.mean())
    theirs = stats.bootstrap((votes,), np.mean, n_resamples=4000, method="percentile", rng=rng)
    interval = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=0.006)


def simulate(rng: np.random.Generator, prompts: int, voters: int, share: float, spread: float) -> np.ndarray:
    """Votes (prompts, voters); each prompt has a share of its own, beta around `share`."""
    own = rng.beta(share * spread, (1 - share) * spread, size=prompts)
    return (rng.random((prompts, voters)) < own[:, None]).astype(float)


def test_bootstrap_intervals_hold_the_truth_where_votes_on_a_prompt_are_alike() -> None:
    rng = np.random.default_rng(2)
    by_prompt = by_vote = 0
    for number in range(200):
        votes = simulate(rng, prompts=80, voters=5, share=0.6, spread=1.5)
        ours = bootstrap_rate(votes.tolist(), seed=number, resamples=500)
        naive = wilson(votes.sum(), votes.size)
        by_prompt += ours.low <= 0.6 <= ours.high
        by_vote += naive.low <= 0.6 <= naive.high
    assert by_prompt / 200 == pytest.approx(0.95, abs=0.04)
    assert by_vote / 200 < 0.85  # what taking the votes for independent would promise too much


def test_the_design_effect_of_alike_votes_is_known() -> None:
    rng = np.random.default_rng(3)
    votes = simulate(rng, prompts=4000, voters=5, share=0.5, spread=1.0)
    # Votes of one prompt correlate by 1 / (spread + 1), so 5 of them count 1 + 4/2 times less.
    assert design_effect(votes.tolist()) == pytest.approx(3, rel=0.1)
    assert design_effect(simulate(rng, 4000, 5, 0.5, 1e9).tolist()) == pytest.approx(1, abs=0.06)
    assert design_effect([[1.0], [1.0]]) == 1


def test_paired_differences_are_those_of_scipy() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(size=40)
    a, b = hard + rng.normal(0, 0.2, 40), hard + 0.3 + rng.normal(0, 0.2, 40)
    ours = paired_difference(a.tolist(), b.tolist())
    theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    apart = stats.ttest_ind(b, a).confidence_interval(0.95)
    assert ours.high - ours.low < 0.5 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="equally many"):
        paired_difference([1.0], [1.0, 2.0])
    assert paired_difference([1.0], [2.0]).high == math.inf


def test_paired_shares_hold_the_truth_and_few_equal_pairs_prove_nothing() -> None:
    assert paired_shares([True] * 4, [True] * 4).high > 0.2
    rng = np.random.default_rng(10)
    held = 0
    for _ in range(300):
        hard = rng.random(60)
        a, b = hard < 0.5, (hard + rng.normal(0, 0.15, 60)) < 0.6
        found = paired_shares(a.tolist(), b.tolist())
        assert found.value == pytest.approx(b.mean() - a.mean())
        held += found.low <= TRUE_GAP <= found.high
    assert held / 300 > 0.92


def _true_gap() -> float:
    hard, noise = (
        np.random.default_rng(11).random(400_000),
        np.random.default_rng(12).normal(0, 0.15, 400_000),
    )
    return float(((hard + noise) < 0.6).mean() - 0.5)


TRUE_GAP = _true_gap()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 99, 1000])
def test_student_quantiles_are_those_of_scipy(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)


def play(rng: np.random.Generator, strengths: np.ndarray, games: int) -> np.ndarray:
    wins = np.zeros((len(strengths),) * 2)
    for i in range(len(strengths)):
        for j in range(i):
            won = rng.binomial(games, strengths[i] / (strengths[i] + strengths[j]))
            wins[i, j], wins[j, i] = won, games - won
    return wins


def test_bradley_terry_finds_known_strengths() -> None:
    truth = np.array([4.0, 2.0, 1.0, 0.5])
    truth /= np.exp(np.log(truth).mean())
    found = bradley_terry(play(np.random.default_rng(5), truth, 20_000))
    assert found == pytest.approx(truth, rel=0.04)


def test_bradley_terry_equals_choix() -> None:
    wins = play(np.random.default_rng(6), np.array([3.0, 1.0, 1.5, 0.7, 1.0]), 30)
    ours = np.log(bradley_terry(wins))
    assert ours == pytest.approx(choix.ilsr_pairwise_dense(wins, max_iter=1000), abs=1e-6)


def test_bradley_terry_says_when_no_strengths_are_likeliest() -> None:
    wins = np.array([[0.0, 5.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="never lost"):
        bradley_terry(wins)
    strong, weak = bradley_terry(wins, prior=0.5)
    assert strong / weak == pytest.approx(5.5 / 0.5)


def test_fleiss_kappa_equals_statsmodels_and_the_published_example() -> None:
    # The 10 subjects, 14 raters and 5 categories of the usual worked example, kappa 0.210.
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    rng = np.random.default_rng(7)
    random = rng.multinomial(4, [0.5, 0.3, 0.2], size=50)
    assert fleiss_kappa(random.tolist()) == pytest.approx(inter_rater.fleiss_kappa(random), abs=1e-12)
    with pytest.raises(ValueError, match="same number of voters"):
        fleiss_kappa([[2, 0], [1, 0]])


def test_krippendorff_alpha_of_the_published_example() -> None:
    coders = ["*****34121133*3", "1*213343*******", "**21344*21133*4"]
    units = [[column for column in unit if column != "*"] for unit in zip(*coders, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["a"]]) == 1
    assert math.isnan(krippendorff_alpha([["a", "a"], ["a"]]))


def test_alpha_of_chance_is_zero_and_close_to_kappa() -> None:
    rng = np.random.default_rng(8)
    units = rng.choice(3, size=(3000, 3), p=[0.5, 0.3, 0.2])
    table = [np.bincount(unit, minlength=3).tolist() for unit in units]
    assert krippendorff_alpha(units.tolist()) == pytest.approx(0, abs=0.03)
    assert krippendorff_alpha(units.tolist()) == pytest.approx(fleiss_kappa(table), abs=1e-3)


def test_the_planner_equals_statsmodels_and_keeps_its_promise() -> None:
    needed = votes_needed(0.53)
    theirs = power.normal_sample_size_one_tail(
        0.03, 0.8, 0.025, std_null=0.5, std_alternative=math.sqrt(0.53 * 0.47)
    )
    assert needed == math.ceil(theirs) == 2178
    rng = np.random.default_rng(9)
    wins = rng.binomial(needed, 0.53, size=4000)
    found = np.mean([wilson(int(w), needed).low > 0.5 for w in wins])
    assert found == pytest.approx(0.80, abs=0.025)
    assert votes_needed(0.47) == needed
    with pytest.raises(ValueError, match="different shares"):
        votes_needed(0.5)


def test_votes_for_an_interval_are_the_fewest() -> None:
    votes = votes_for_interval(0.03)
    assert votes == pytest.approx(proportion.samplesize_confint_proportion(0.5, 0.03), rel=0.01)
    for number, wide in ((votes, False), (votes - 1, True)):
        estimate = wilson(number / 2, number)
        assert ((estimate.high - estimate.low) / 2 > 0.03) == wide
