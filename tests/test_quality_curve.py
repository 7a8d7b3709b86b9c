"""The curve of judged quality is drawn from measured rows; snapshots that have them are not measured anew."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from load_script import load_script

from triptych.evaluation.charts import curve_plot
from triptych.evaluation.metrics import Estimate


def test_rows_become_lines_that_rise_where_quality_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("quality_curve")
    for count, value in ((0, 0.2), (500, 0.7)):
        for name, what in script.MEASURES.values():
            folder = tmp_path / "rows" / str(count) / name.split("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            row = {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 100}
            (folder / f"{name}.json").write_text(json.dumps({"measures": {what: row}, "numbers": {}}))
    monkeypatch.setattr(script, "measure", lambda job: pytest.fail("everything was measured already"))
    out = tmp_path / "quality.svg"
    given = [str(tmp_path / "rows"), "0=first", "500=last", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["quality_curve.py", *given])
    script.main()
    lines = re.findall(r'<polyline points="([^"]+)"', out.read_text())
    assert len(lines) == len(script.MEASURES)
    for line in lines:
        (left, low), (right, high) = (map(float, point.split(",")) for point in line.split())
        assert left < right
        assert low - high == pytest.approx(0.5 * (330 - 48), abs=0.2)  # upwards is less in SVG


def test_names_of_curves_that_end_together_stand_apart() -> None:
    end = Estimate(0.5, 0.4, 0.6, 100)
    drawn = curve_plot("t", {"one": [(0, end)], "two": [(0, end)]}, "updates", "")
    levels = [float(y) for y in re.findall(r'<text x="568" y="([\d.]+)"', drawn)]
    assert abs(levels[0] - levels[1]) >= 15
