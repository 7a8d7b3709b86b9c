"""A comparison with published judges and a detector, from the command to the report that is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_detector import write_detector
from test_scorers import write_clip

from triptych.apps.cli.main import run
from triptych.data.shapes import draw_shapes
from triptych.evaluation.charts import Point, pareto_plot
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate
from triptych.evaluation.runs import compare_rows
from triptych.evaluation.tables import write_rows

STUDY = """
name = "folders"
prompts = ["objects", "structured"]
count = 6
judges = ["pickscore", "detector"]
judge_weights = "{here}/weights"

[[systems]]
name = "first"
folder = "{here}/first"

[[systems]]
name = "second"
folder = "{here}/second"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    for number, name in enumerate(("first", "second")):
        (folder / name).mkdir()
        for index in range(12):
            draw_shapes(100 * number + index, 64, 64).image.save(folder / name / f"{index:05d}.png")
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def weights(place: Path) -> Path:
    write_clip(place / "weights" / "pickscore")
    write_detector(place / "weights" / "detector")
    return place / "weights"


def test_a_missing_judge_is_told_before_drawing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "early"
    arguments = ["compare", str(place / "study.toml"), "--out", str(out), "--weights", str(place / "none")]
    assert run(arguments) == 2
    assert "hf download yuvalkirstain/PickScore_v1" in capsys.readouterr().err
    assert not out.exists()


def test_judges_numbers_reach_tables_plots_rows_and_the_report(
    place: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = place / "out", place / "kept"
    arguments = ["compare", str(place / "study.toml"), "--out", str(out), "--report", str(kept)]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "pickscore" in said
    assert "ahead of first by" in said
    rows = list(read_lines(out / "results.jsonl"))
    assert len(rows) == 24
    assert all(row["pickscore"] != 0 and row["seconds"] > 0 for row in rows)
    assert all(row["right"] in (True, False) for row in rows)
    assert {row["category"] for row in rows} >= {"counting", "binding", "one"}
    sheet = (out / "index.html").read_text(encoding="utf-8")
    assert "Judges&#x27; numbers" in sheet or "Judges' numbers" in sheet
    for name in ("pareto-pickscore.svg", "README.md", "index.html", "study.json", "results.jsonl"):
        assert (kept / name).is_file(), name
    assert str(place) not in (kept / "README.md").read_text(encoding="utf-8")
    strips = sorted((kept / "strips").iterdir())
    assert len(strips) == 12
    with Image.open(strips[0]) as strip:
        assert strip.size == (2 * 192 + 4, 192)
    before = (out / "scores.jsonl").read_bytes()
    assert run(arguments) == 0  # nothing is judged twice, and the report is written anew
    assert (out / "scores.jsonl").read_bytes() == before
    pair = [[row for row in rows if row["system"] == name] for name in ("first", "second")]
    assert compare_rows(*pair)["pickscore"].count == 12


def test_a_report_keeps_to_its_size(place: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, small = place / "out", place / "small"
    arguments = ["compare", str(place / "study.toml"), "--out", str(out), "--report", str(small)]
    assert run([*arguments, "--report-size", "0.1"]) == 0
    size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    assert 40_000 < size <= 100_000
    assert list((small / "strips").iterdir())
    (place / "other").mkdir()
    (place / "other" / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert run([*arguments[:-1], str(place / "other")]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_rows_are_kept_as_lines_and_as_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": "a", "right": True, "seen": ["red circle"], "rank": 3},
        {"prompt": "b", "right": None, "odd": 1.5},
        {"prompt": "c", "odd": "text"},
    ]
    lines, table = write_rows(rows, tmp_path / "results")
    assert [json.loads(line) for line in lines.read_text().splitlines()] == rows
    found = parquet.read_table(table).to_pylist()
    assert [row["prompt"] for row in found] == ["a", "b", "c"]
    assert found[0]["seen"] == ["red circle"]
    assert [row["odd"] for row in found] == [None, "1.5", '"text"']
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "results.parquet"]


def test_without_pyarrow_there_are_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.evaluation.tables.find_spec", lambda name: None)
    assert [path.name for path in write_rows([{"a": 1}], tmp_path / "results")] == ["results.jsonl"]


def test_names_in_a_plot_do_not_cover_each_other() -> None:
    points = [Point(f"system {n}", 1 + n / 50, Estimate(0.5 + n / 500, 0.4, 0.6, 9)) for n in range(8)]
    plot = pareto_plot("crowded", points, "share right")
    places = re.findall(r'<text x="([^"]+)" y="([^"]+)"[^>]*>system \d', plot)
    assert len(set(places)) == len(places) == 8
    assert "3.5" in pareto_plot("raw", [Point("a", 1, Estimate(3.5, 3.5, 3.5, 1))] * 2, "mean", share=False)


def test_the_levels_of_a_plot_are_round_numbers() -> None:
    points = [Point("a", 1, Estimate(0.1, 0.0, 0.49, 4)), Point("b", 2, Estimate(0.2, 0.1, 0.3, 4))]
    assert re.findall(r">(\d+) %<", pareto_plot("quarter", points, "share right")) == [
        "0",
        "10",
        "20",
        "30",
        "40",
        "50",
    ]
