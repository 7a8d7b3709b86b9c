"""docs/evaluation.md as a user would follow it: its commands run in order, at tiny size."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from triptych.apps.cli.main import run
from triptych.data.shapes import draw_shapes
from triptych.evaluation.study_file import read_study

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
SERVES = "triptych study runs/tiny/study"  # tests/apps/test_study_page.py votes on it
TWO_SYSTEMS = (
    "--set count=2 --set systems=[{name='a',steps=2,decoder_steps=1},{name='b',steps=1,decoder_steps=1}]"
)
SMALLER = {  # what makes a command quick without changing what it does
    "triptych evaluate structured --out before": "--count 1 --steps 2 --decoder-steps 1",
    "triptych evaluate structured --guidance 7 --out after": "--count 1 --steps 2 --decoder-steps 1",
    "triptych evaluate scores --prompts structured --count 10 --out scored": "--count 2 --steps 2 "
    "--decoder-steps 1",
    "triptych compare recipes/tiny/study.toml": TWO_SYSTEMS,
    "triptych compare recipes/tiny/study.toml --report report": TWO_SYSTEMS,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("evaluation-docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name, first in (("real", 0), ("made", 100)):
        (folder / name).mkdir()
        for seed in range(5):
            draw_shapes(first + seed, 64, 64).image.save(folder / name / f"{seed}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def fill_in(sheet: Path) -> None:
    """What a person would do between two commands of the page."""
    with open(sheet, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        tiles = [len(Image.open(sheet.parent / row[side]).getcolors(1 << 20)) for side in ("left", "right")]
        row["answer"] = "tie" if min(tiles) > 400 else ("right" if tiles[0] < tiles[1] else "left")
    with open(sheet, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_page_goes_from_prompts_to_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        if command == SERVES:
            continue
        if "--import" in command:
            fill_in(workplace / "crowd" / "sheet.csv")
        _, *arguments = shlex.split(command) + shlex.split(SMALLER.get(command, ""), posix=False)
        assert run(arguments) == 0, (command, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "votes taken" in said
    assert "cannot be" not in said
    for name in ("index.html", "pareto.svg", "study/report.html", "study/votes.jsonl", "study/alignment.svg"):
        assert (workplace / "runs" / "tiny" / "study" / name).is_file(), name
    for name in ("scored/scores.jsonl", "report/README.md", "report/index.html", "report/pareto.svg"):
        assert (workplace / name).is_file(), name
    assert SERVES in COMMANDS


@pytest.mark.parametrize("block", re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
def test_studies_of_the_page_are_understood(block: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(block, encoding="utf-8")
    study = read_study(tmp_path / "study.toml")
    assert len(study.systems) in (2, 5)
    if len(study.systems) == 5:
        assert len(study.prompts) == 1732
        assert study.systems[0].describe()["steps"] + study.systems[0].describe()["decoder_steps"] == 30
    else:
        assert block.strip() in (ROOT / "recipes/tiny/study.toml").read_text(encoding="utf-8")


def test_the_study_of_mini_is_a_hundred_prompts_that_judges_understand() -> None:
    study = read_study(ROOT / "recipes" / "mini" / "study.toml")
    assert len(study.prompts) == 100
    assert all(prompt.truth for prompt in study.prompts)
    assert len(study.systems) == 8
