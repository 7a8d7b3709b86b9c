"""Two measured runs compared picture by picture: rows of JSON, paired by prompt and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.errors import DataError
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate
from triptych.evaluation.statistics import paired_difference, paired_shares

IDENTITY = ("system", "key", "prompt", "seed", "stem", "index", "time", "number")  # what a row is about
PERCENT = 100.0  # shares are told in points of a hundred

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a run. Raises DataError when there are none."""
    rows = list(read_lines(path))
    if not rows:
        raise DataError(f"{path} holds no rows of a measured run (JSON lines).")
    return rows


def compare_rows(first: list[Row], second: list[Row]) -> dict[str, Estimate]:
    """How much larger each measure is in the second run, with a paired 95 % interval.

    Rows belong together when prompt (or key) and seed agree. Yes-or-no measures count in points of a hundred.
    Raises DataError when no rows belong together or a run has the same picture twice.
    """
    before, after = _by_picture(first), _by_picture(second)
    shared = [picture for picture in before if picture in after]
    if not shared:
        raise DataError("The two runs have no prompt and seed in common; nothing can be paired.")
    found: dict[str, Estimate] = {}
    for name in before[shared[0]]:
        if name in IDENTITY:
            continue
        pairs = [(before[p].get(name), after[p].get(name)) for p in shared]
        told = [(a, b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
        if told:
            found[name] = _difference([a for a, _ in told], [b for _, b in told])
    return found


def _difference(a: list[float], b: list[float]) -> Estimate:
    if not all(isinstance(value, bool) for value in (*a, *b)):
        return paired_difference(a, b)
    share = paired_shares([bool(value) for value in a], [bool(value) for value in b])
    return Estimate(PERCENT * share.value, PERCENT * share.low, PERCENT * share.high, share.count)


def _by_picture(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        picture = (row.get("key", row.get("prompt")), row.get("seed"))
        if picture in found:
            raise DataError(f"A run has the picture of {picture[0]!r} and seed {picture[1]} twice.")
        found[picture] = row
    return found
