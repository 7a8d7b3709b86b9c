"""`triptych generate --prompts`: every line becomes pictures, once, and the same ones as alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.apps.cli.main import run
from triptych.images import read_metadata
from triptych.pipelines.parts import Parts


def generate(model: Path, out: Path, *arguments: str) -> int:
    return run(["generate", *arguments, "--model", str(model), "--dtype", "float32", "--out", str(out)])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a star\n\na red apple\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("how", [[], ["--low-memory"], ["--pipelined"]])
def test_each_line_gives_the_picture_that_its_prompt_gives_alone(
    tiny_cascade: Path, tmp_path: Path, prompts: Path, how: list[str]
) -> None:
    out = tmp_path / "out"
    assert generate(tiny_cascade, out, "--prompts", str(prompts), "--seed", "3", "--count", "2", *how) == 0
    made = ["0001-a-star-3.png", "0001-a-star-4.png", "0003-a-red-apple-3.png", "0003-a-red-apple-4.png"]
    assert names(out) == made
    assert generate(tiny_cascade, tmp_path, "a red apple", "--seed", "4") == 0
    assert np.abs(pixels(out / made[3]) - pixels(tmp_path / "a-red-apple-4.png")).max() <= 1
    assert run(["generate", "--like", str(out / made[1]), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "a-star-4.png").read_bytes() == (out / made[1]).read_bytes()


def test_lines_of_json_set_what_they_like(tiny_cascade: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a star", "size": "64x32", "seeds": [9]}, {"prompt": "sky", "steps": 2, "seed": 5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert generate(tiny_cascade, tmp_path / "out", "--prompts", str(path), "--decoder-steps", "1") == 0
    first, second = (read_metadata(tmp_path / "out" / name) for name in names(tmp_path / "out"))
    assert (first["seed"], first["request"]["size"], first["request"]["decoder_steps"]) == (9, [64, 32], 1)
    assert (second["seed"], second["request"]["steps"], second["request"]["decoder_steps"]) == (5, 2, 1)


def test_what_is_there_is_not_made_again(
    tiny_cascade: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert generate(tiny_cascade, out, "--prompts", str(prompts), "--json") == 0
    assert names(out) == ["0001-a-star-0.png", "0003-a-red-apple-0.png"]
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.rindex("\n{") :]) == {"pictures": [], "present": 2}
    assert generate(tiny_cascade, out, "--prompts", str(prompts), "--steps", "2") == 0
    assert names(out)[1] == "0001-a-star-0.png"  # of other settings: made beside it, under another name
    assert len(names(out)) == 4


def test_an_interrupted_run_takes_stage_c_from_where_it_was(
    tiny_cascade: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, turn = tmp_path / "out", Parts.turn

    def stopping(at: str) -> Callable[[Parts, str], object]:
        def take(parts: Parts, part: str) -> object:
            if part == at:
                raise KeyboardInterrupt
            return turn(parts, part)

        return take

    monkeypatch.setattr(Parts, "turn", stopping("stage_b"))
    command = (tiny_cascade, out, "--prompts", str(prompts), "--low-memory")
    assert generate(*command) == 130
    kept = names(out / ".triptych-work")
    assert len(kept) == 2
    monkeypatch.setattr(Parts, "turn", stopping("stage_c"))
    assert generate(*command) == 0
    assert names(out) == ["0001-a-star-0.png", "0003-a-red-apple-0.png"]


def test_each_stage_is_loaded_once(
    tiny_cascade: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = Parts._load
    monkeypatch.setattr(Parts, "_load", lambda parts, part: (loaded.append(part), load(parts, part))[1])
    options = ("--prompts", str(prompts), "--count", "3", "--low-memory")
    assert generate(tiny_cascade, tmp_path / "out", *options) == 0
    assert sorted(loaded) == ["stage_a", "stage_b", "stage_c", "text_encoder"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a", "stepz": 3}', r'line 1: There is no setting "stepz"'),
        ('{"steps": 3}', 'line 1: a JSON object with a "prompt" was expected'),
        ("a star", "line 1: this is not JSON"),
        ('\n{"prompt": "a", "size": "63x64"}', "line 2: Size 63x64 cannot be made"),
        ("\n", "has no prompts"),
    ],
)
def test_mistakes_name_their_line(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    assert generate(tiny_cascade, tmp_path / "out", "--prompts", str(path)) == 2
    assert said in capsys.readouterr().err
