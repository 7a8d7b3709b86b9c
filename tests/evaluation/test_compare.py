"""Comparisons: the same prompts and seeds for every system, resumed and shared without changing a picture."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych import Cascade
from triptych.apps.cli.main import run
from triptych.errors import DataError, SettingsError
from triptych.evaluation import compare as comparing
from triptych.evaluation.charts import Point, pareto_front
from triptych.evaluation.compare import Process, compare, missing, study_tasks
from triptych.evaluation.evaluate import SEED_STRIDE
from triptych.evaluation.lines import LineWriter, read_lines
from triptych.evaluation.metrics import Estimate
from triptych.evaluation.prompts import study_prompts
from triptych.evaluation.study_file import Study, read_study
from triptych.images import read_metadata

ROOT = Path(__file__).parents[2]
STUDY = """
name = "tiny <study>"
prompts = ["structured"]
count = 5
seeds = [0, 3]
size = "64x64"
device = "cpu"

[[systems]]
name = "short"
model = "{model}"
dtype = "float32"
steps = 1
batch = 1

[[systems]]
name = "longer"
model = "{model}"
dtype = "float32"
steps = 2
batch = 2
"""


@pytest.fixture
def study(tiny_cascade: Path, tmp_path: Path) -> Study:
    (tmp_path / "study.toml").write_text(STUDY.format(model=tiny_cascade.as_posix()), encoding="utf-8")
    return read_study(tmp_path / "study.toml")


def pictures(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): Image.open(p).tobytes() for p in sorted(out.rglob("pictures/*/*.png"))}


def test_every_system_draws_every_prompt_with_the_same_recorded_seeds(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare(study, out)
    names = {path.name for path in (out / "pictures" / "short").iterdir()}
    assert names == {path.name for path in (out / "pictures" / "longer").iterdir()}
    assert names == {f"{i:05d}-{seed * SEED_STRIDE + i}.png" for i in range(5) for seed in (0, 3)}
    stored = read_metadata(out / "pictures" / "longer" / "00004-3000004.png")
    assert (stored["prompt"], stored["seed"]) == (study.prompts[4].prompt, 3000004)
    assert stored["request"]["steps"] == 2
    recorded = json.loads((out / "study.json").read_text())
    assert recorded["systems"]["short"]["steps"] == 1
    assert recorded["prompts"][0]["truth"]["objects"]


def test_a_picture_is_the_one_that_its_settings_make_alone(
    study: Study, tiny_cascade: Path, tmp_path: Path
) -> None:
    compare(study, tmp_path / "out")
    (alone,) = (
        Cascade.load(tiny_cascade, dtype="float32")
        .generate(study.prompts[1].prompt, seed=1, steps=1, size="64x64")
        .images
    )
    made = Image.open(tmp_path / "out" / "pictures" / "short" / "00001-1.png")
    differences = [abs(a - b) for a, b in zip(alone.tobytes(), made.tobytes(), strict=True)]
    assert max(differences) <= 1


def test_three_processes_and_an_interruption_make_the_same_pictures_as_one(
    study: Study, tmp_path: Path
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    compare(study, whole)
    told: list[tuple[str, int, int]] = []

    class Stop(Exception):
        pass

    def stop(*progress: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        compare(study, shared, Process(1, 3), stop)
    assert [compare(study, shared, Process(rank, 3), lambda *p: told.append(p)) for rank in range(3)] == [
        False,
        False,
        True,
    ]
    assert pictures(shared) == pictures(whole)
    assert len(pictures(whole)) == 20


def test_torchrun_shares_the_work_and_changes_no_picture(study: Study, tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    compare(study, whole)
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "triptych.apps.cli.main", "compare", str(tmp_path / "study.toml"), "--out", str(shared)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launched, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(shared) == pictures(whole)
    ranks = {row["rank"] for name in ("short", "longer") for row in comparing.read_records(name, shared)}
    assert ranks == {0, 1}
    assert (shared / "index.html").is_file()
    assert "20 pictures" not in done.stdout  # ten a system
    assert "short: 10 pictures" in done.stdout


def test_what_is_there_is_not_made_again_and_what_is_lost_is(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(study, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    compare(study, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    lost = out / "pictures" / "longer" / "00002-2.png"
    kept = Image.open(lost).tobytes()
    lost.unlink()
    assert [task.stem for task in missing("longer", study_tasks(study), out)] == ["00002-2"]
    compare(study, out)
    assert Image.open(lost).tobytes() == kept


def test_other_settings_or_prompts_do_not_mix_with_pictures_that_are_there(
    study: Study, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare(study, out)
    file = tmp_path / "study.toml"
    text = file.read_text()
    file.write_text(text.replace("steps = 1", "steps = 4"))
    with pytest.raises(SettingsError, match='pictures of "short" made with steps 1, and now it is 4'):
        compare(read_study(file), out)
    file.write_text(text.replace("structured", "aesthetic"))
    with pytest.raises(SettingsError, match="other prompts"):
        compare(read_study(file), out)
    file.write_text(
        text + '\n[[systems]]\nname = "copy"\nfolder = "' + (out / "pictures/short").as_posix() + '"\n'
    )
    assert compare(read_study(file), out)
    made = pictures(out)
    assert made["pictures/copy/00003-3.png"] == made["pictures/short/00003-3.png"]


def test_a_folder_without_a_picture_says_which(study: Study, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "00000.png")
    file = tmp_path / "folder.toml"
    file.write_text('prompts = "aesthetic"\ncount = 2\n[[systems]]\nname = "p"\nfolder = "{here}/photos"\n')
    with pytest.raises(DataError, match=r"no picture of prompt 1 .*00001.png was expected"):
        compare(read_study(file), tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('name = "a"\nstepps = 3', r'system 1 \("a"\): There is no setting "stepps": did you mean "steps"'),
        ('name = "a"\nseed = 3', "seed is the same for all systems"),
        ('name = "a/b"', "needs a name of letters"),
        ('name = "a"\npreset = "sdxll"', 'no preset "sdxll": did you mean "sdxl"'),
        ('name = "a"\npreset = "sdxl"\nguidanec = 2', 'no setting "guidanec": did you mean "guidance"'),
        ('name = "a"\npipeline = "X"', "setting model is missing"),
        ('name = "a"\nkind = "diffuser"\n', 'did you mean "diffusers"'),
        ('name = "a"\nfolder = "x"\nsteps = 3', 'no setting "steps" for a folder'),
        ('name = "a"\n[[systems]]\nname = "a"', 'two systems are called "a"'),
        ('name = "a"\nsampler = "dpm"', 'no sampler "dpm"'),
    ],
)
def test_mistakes_in_the_file_are_explained(table: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f'prompts = "aesthetic"\n[[systems]]\n{table}\n')
    with pytest.raises(SettingsError, match=message):
        read_study(file)


def test_named_prompts_are_whole_and_chosen_at_even_distances() -> None:
    parti = study_prompts("parti")
    assert len(parti) == 1632
    assert len({p.category for p in parti}) == 12
    assert len({p.challenge for p in parti}) == 11
    few = study_prompts("parti", 100)
    assert {p.category for p in few} == {p.category for p in parti}
    assert few == study_prompts("parti", 100)
    aesthetic = study_prompts("aesthetic")
    assert len({p.prompt for p in aesthetic}) == 100
    kinds = [p.category for p in study_prompts("structured")]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("single", "colours", "counting", "binding", "position"), 20
    )


def test_prompts_are_read_from_text_tables_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "a.tsv").write_text('Category\tPrompt\nAnimals\ta "cat"\nx\t\n')
    (tmp_path / "a.jsonl").write_text('{"prompt":"a star","truth":{"concept":"star"}}\n')
    (tmp_path / "bad.jsonl").write_text('{"text":"a star"}\n')
    (tmp_path / "bad.tsv").write_text("Text\tKind\nx\ty\n")
    assert [p.prompt for p in study_prompts(str(tmp_path / "a.txt"))] == ["a cat", "a dog"]
    (row,) = study_prompts(str(tmp_path / "a.tsv"))
    assert (row.prompt, row.category) == ('a "cat"', "Animals")
    assert study_prompts(str(tmp_path / "a.jsonl"))[0].truth == {"concept": "star"}
    for name, message in (
        ("bad.jsonl", "line 1"),
        ("bad.tsv", "no column Prompt"),
        ("none.txt", "no prompts"),
    ):
        with pytest.raises(DataError, match=message):
            study_prompts(str(tmp_path / name))


def test_lines_survive_a_cut_and_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":')
    with LineWriter(path) as writer:
        writer.append({"a": 2})
        code = "import pathlib, sys, triptych.evaluation.lines as l; l.LineWriter(pathlib.Path(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
        )
        assert "being written by another process" in done.stderr
    assert [row["a"] for row in read_lines(path)] == [1, 2]


def test_the_front_holds_what_nothing_beats() -> None:
    def point(name: str, seconds: float, value: float) -> Point:
        return Point(name, seconds, Estimate(value, value - 0.1, value + 0.1, 9))

    points = [point("slow", 9, 0.9), point("fast", 1, 0.5), point("worse", 2, 0.4), point("same", 10, 0.9)]
    assert [p.name for p in pareto_front(points)] == ["fast", "slow"]


def test_the_command_leaves_a_sheet_that_needs_nothing_from_outside(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["compare", str(tmp_path / "study.toml"), "--out", str(out), "--set", "count=2"]) == 0
    told = capsys.readouterr()
    assert "longer: 4 pictures" in told.out
    assert "points (same pictures)" in told.out
    assert "short: 4 of 4 pictures" in told.err
    sheet = (out / "index.html").read_text(encoding="utf-8")
    assert "<h1>tiny &lt;study&gt;</h1>" in sheet
    assert "<svg" in sheet
    assert not re.search(r"(src|href)=\"(https?:)?//|@import|<script", sheet)
    sources = re.findall(r'src="([^"]+)"', sheet)
    assert len(sources) == 8
    assert all((out / source).is_file() for source in sources)
    assert len(list(read_lines(out / "scores.jsonl"))) == 8
    assert (
        run(["compare", str(tmp_path / "study.toml"), "--out", str(out), "--set", "count=2", "--json"]) == 0
    )
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["systems"]] == ["short", "longer"]


def peaks_begin_anew() -> bool:
    """Whether this kernel honours `clear_refs`: real Linux does, some sandboxes only pretend to."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

    try:
        held = mmap.mmap(-1, 64 * 2**20)
        held.write(b"x" * len(held))
        before = peak()
        held.close()
        Path("/proc/self/clear_refs").write_text("5")
        return peak() < before - 32 * 2**10
    except (OSError, StopIteration):
        return False


def test_the_memory_of_a_group_is_its_own() -> None:
    if torch.cuda.is_available():
        pytest.skip("the device's memory is told")
    if not peaks_begin_anew():
        pytest.skip("this system tells the peak since the process began")
    comparing._reset_memory()
    held = mmap.mmap(-1, 300 * 2**20)  # given back at once when closed, unlike what an allocator may keep
    held.write(b"x" * len(held))
    large = comparing._memory()["peak_bytes"]
    held.close()
    comparing._reset_memory()
    assert comparing._memory()["peak_bytes"] < large - 200 * 2**20


def test_torchruns_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Process.of_environment() == Process()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Process.of_environment() == Process(1, 4, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(SettingsError, match="does not fit"):
        Process.of_environment()


def test_two_runs_are_compared_picture_by_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, right in (("a", [0, 0, 1, 0] * 25), ("b", [1, 0, 1, 0] * 25)):
        rows = [{"prompt": f"p{i}", "seed": i, "right": bool(r), "psnr": 20 + r} for i, r in enumerate(right)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    assert run(["compare", a, b]) == 0
    said = capsys.readouterr().out
    assert f"right: {b} higher than {a} by 25 ± 8.6 (100 pairs)" in said
    assert "psnr" in said
    assert run(["compare", a, b, a]) == 2


@pytest.mark.slow
def test_the_study_of_the_recipes_runs(tmp_path: Path) -> None:
    assert run(["compare", str(ROOT / "recipes/tiny/study.toml"), "--out", str(tmp_path / "out")]) == 0


def test_the_recipes_study_is_understood() -> None:
    study = read_study(ROOT / "recipes" / "tiny" / "study.toml")
    assert len(study.prompts) == 4
    assert [system.name for system in study.systems] == ["guided", "unguided"]
    assert os.path.basename(study.settings.out) == "study"
    assert comparing.study_tasks(study)[0].seed == 0


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*/study.toml")), ids=str)
def test_the_studies_in_the_repository_are_valid(path: Path) -> None:
    study = read_study(path)
    assert len(study.systems) >= 2
    assert len(study.prompts) >= 4
