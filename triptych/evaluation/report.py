"""The report of a study: one HTML file that needs nothing else, and the same as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from triptych.evaluation.charts import Bar, bar_chart
from triptych.evaluation.metrics import Estimate, amount
from triptych.evaluation.sheet import page
from triptych.evaluation.study import INTERVAL, PUBLISHED, PUBLISHED_REFERENCE, Duel, Outcome, Verdict
from triptych.images import replace

TITLES = {"alignment": "Prompt alignment", "looks": "Looks"}
METHOD = (
    "Pictures were drawn with seeds fixed beforehand. Voters saw two at a time, on random sides and in an "
    "order of their own, without any name. Alignment was asked with the prompt, looks without it, apart from "
    "each other. A tie is half a win for both. Voters who missed more than a fifth of the attention checks "
    "(one picture a degraded twin of the other) are not counted. Intervals are 95 %: of the chart by "
    "bootstrap over prompts, because several votes on one prompt are alike."
)


def write_report(found: Outcome, folder: Path) -> Path:
    """Write report.html, results.json and a chart per question (SVG) into FOLDER/study."""
    place = folder / "study"
    parts = [f"<h1>{escape(found.name)}</h1>", f"<p>{escape(told(found))}</p>"]
    for verdict in found.verdicts:
        parts.append(f"<h2>{TITLES[verdict.question]}</h2>")
        if not any(duel.tally.votes for duel in verdict.duels):
            parts.append("<p>No votes yet.</p>")
            continue
        for reference, duels in _by_first(verdict.duels).items():
            chart = chart_of(verdict, reference, duels)
            replace(place / f"{verdict.question}{_suffix(reference, found)}.svg", (chart + "\n").encode())
            parts.append(chart)
        parts += [duel_table(verdict), category_table(verdict), strength_table(verdict), agreement(verdict)]
    parts += [f"<h2>How it was asked</h2>\n<p>{METHOD}</p>", published_table()]
    path = place / "report.html"
    replace(path, page(found.name, "\n".join(part for part in parts if part)).encode())
    replace(place / "results.json", (_json(found) + "\n").encode())
    return path


def told(found: Outcome) -> str:
    """How many voted, and who was left out."""
    return (
        f"{amount(found.votes, 'vote')} by {amount(found.voters - len(found.excluded), 'voter')}; "
        f"{found.skipped} skipped; "
        f"{len(found.excluded)} of {found.voters} voters left out for missed attention checks."
    )


def chart_of(verdict: Verdict, reference: str, duels: Sequence[Duel]) -> str:
    """The bar chart of one question."""
    bars = [Bar(duel.b, duel.tally, duel.rate, duel.published) for duel in duels]
    return bar_chart(f"{TITLES[verdict.question]}: {reference} against", bars, reference)


def _by_first(duels: Sequence[Duel]) -> dict[str, list[Duel]]:
    groups: dict[str, list[Duel]] = {}
    for duel in duels:
        groups.setdefault(duel.a, []).append(duel)
    return groups


def _suffix(reference: str, found: Outcome) -> str:
    return "" if reference == found.reference else f"-{reference}"


def duel_table(verdict: Verdict) -> str:
    """Win rates of one question with both intervals, and how many votes are still to be gathered."""
    head = (
        "",
        "win / tie / loss",
        "win rate",
        "Wilson, votes as independent",
        "design effect",
        "votes still needed",
    )
    rows = []
    for duel in verdict.duels:
        t = duel.tally
        published = "" if duel.published is None else f" (published {100 * duel.published:.1f} %)"
        rows.append(
            (
                f"{duel.a} against {duel.b}",
                f"{t.wins} / {t.ties} / {t.losses}",
                percent(duel.rate) + published,
                percent(duel.wilson),
                f"{duel.effect:.2f}",
                f"{duel.more_votes}",
            )
        )
    note = f"Votes still needed: until the interval is at most ± {100 * INTERVAL:.0f} points."
    return _table(head, rows) + f'\n<p class="quiet">{note}</p>'


def category_table(verdict: Verdict) -> str:
    """Win rates by category of prompt; empty when prompts have none."""
    kinds = sorted({kind for duel in verdict.duels for kind in duel.categories})
    if not kinds:
        return ""
    head = ("win rate by category", *(f"against {duel.b}" for duel in verdict.duels))
    rows = []
    for kind in kinds:
        found = [duel.categories.get(kind) for duel in verdict.duels]
        rows.append((kind, *("" if e is None else f"{percent(e)}, {amount(e.count, 'vote')}" for e in found)))
    return _table(head, rows)


def strength_table(verdict: Verdict) -> str:
    """Bradley-Terry strengths, the strongest first."""
    if not verdict.strengths:
        return ""
    order = sorted(verdict.strengths.items(), key=lambda one: -one[1].value)
    rows = [(name, f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})") for name, e in order]
    return _table(("system", "Bradley-Terry strength"), rows)


def agreement(verdict: Verdict) -> str:
    """One line about the voters."""
    whole, items = verdict.enough_raters
    alpha = verdict.agreement
    agreed = "cannot be told yet" if math.isnan(alpha) else f"{alpha:.2f} (1 complete, 0 as by chance)"
    return (
        f"<p>Agreement between voters (Krippendorff's alpha): {agreed}. "
        f"{whole} of {items} pairs have as many voters as planned.</p>"
    )


def published_table() -> str:
    """The announcement's figures, for comparison."""
    names = list(PUBLISHED["alignment"])
    rows = [(TITLES[q], *(f"{100 * PUBLISHED[q][name]:.1f} %" for name in names)) for q in PUBLISHED]
    head = (f"published: {PUBLISHED_REFERENCE} (30 steps) preferred to", *names)
    return f"<h2>The published study</h2>\n{_table(head, rows)}"


def lines(found: Outcome) -> list[str]:
    """The results for a terminal."""
    said = [told(found)]
    for verdict in found.verdicts:
        said.append(TITLES[verdict.question])
        for duel in verdict.duels:
            t = duel.tally
            said.append(
                f"  {duel.a} against {duel.b}: {percent(duel.rate)}; {t.wins} won, {t.ties} tied, "
                f"{t.losses} lost; {duel.more_votes} more votes for ± {100 * INTERVAL:.0f} points"
            )
    return said


def percent(estimate: Estimate) -> str:
    """ "53.0 % (51.2 to 54.8)" """
    if estimate.count == 0:
        return "no votes"
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def as_json(found: Outcome) -> dict[str, Any]:
    """Plain values; what cannot be told is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    result: dict[str, Any] = plain(asdict(found))
    return result


def _json(found: Outcome) -> str:
    return json.dumps(as_json(found), ensure_ascii=False, indent=1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for name, *cells in rows:
        lines.append(
            f"<tr><td>{escape(name)}</td>" + "".join(f"<td class=n>{escape(c)}</td>" for c in cells) + "</tr>"
        )
    return "\n".join([*lines, "</table>"])
