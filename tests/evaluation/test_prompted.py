"""Prompts drawn and judged, and pictures that hold their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_scorers import write_clip

from triptych import Cascade
from triptych.apps.cli.main import run
from triptych.data.shapes import draw_shapes
from triptych.data.sources import DrawnShapes
from triptych.evaluation.evaluate import evaluate_reconstruction
from triptych.evaluation.lines import read_lines
from triptych.evaluation.perceptual import Distance
from triptych.images import save_png


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    write_clip(folder / "pickscore")
    return folder


def test_prompts_are_drawn_and_judged_in_both_ways(
    tiny_cascade: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "scores", "--model", str(tiny_cascade), "--size", "64x64", "--count", "3"]
    more = ["--prompts", "structured", "--judges", "pickscore", "--weights", str(weights)]
    assert run([*arguments, *more, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "scores (3 pictures)" in said
    assert "pickscore" in said
    rows = list(read_lines(tmp_path / "out" / "scores.jsonl"))
    assert [type(row["pickscore"]) for row in rows] == [float] * 3
    assert all(row["right"] in (True, False) for row in rows)
    assert run([*arguments, "--prompts", "aesthetic"]) == 2
    assert "Nothing judges these prompts" in capsys.readouterr().err


def test_pictures_are_judged_by_the_prompts_in_their_files(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        sample = draw_shapes(seed, 64, 64)
        save_png(tmp_path, f"p{seed}", sample.image, {"prompt": sample.caption, "seed": seed})
    arguments = ["evaluate", "scores", "--pictures", str(tmp_path), "--weights", str(weights)]
    assert run([*arguments, "--judges", "pickscore", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in report["rows"]] == [1, 2]
    assert report["measures"]["pickscore"]["count"] == 2
    assert run(arguments) == 2
    assert "need judges" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "q.png")
    assert run([*arguments, "--judges", "pickscore"]) == 2
    assert "holds no triptych settings" in capsys.readouterr().err


def test_reconstructions_take_distances(tiny_cascade: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cascade = Cascade.load(tiny_cascade, dtype="float32")
    half = Distance("lpips alex", lambda a, b: torch.full((len(a),), 0.5))
    report = evaluate_reconstruction(cascade, DrawnShapes(2, canvases=[(64, 64)]), 2, distances=[half])
    assert report.measures["a lpips alex"].value == report.measures["b+a lpips alex"].value == 0.5
    arguments = ["evaluate", "reconstruction", "--model", str(tiny_cascade), "--judges", "lpips"]
    assert run(arguments) == 2
    assert "alexnet-owt-7be5be79.pth" in capsys.readouterr().err
    assert run(["evaluate", "icons", "--model", str(tiny_cascade), "--judges", "lpips"]) == 2
    assert "--judges is for scores and reconstruction" in capsys.readouterr().err
