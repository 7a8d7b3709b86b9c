"""`triptych generate` as people run it: pictures, repeats, JSON, and one line for every mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.apps.cli.main import run
from triptych.images import read_metadata

COMMAND = [sys.executable, "-m", "triptych.apps.cli.main"]


def pictures(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def generate(model: Path, out: Path, *arguments: str) -> int:
    return run(["generate", *arguments, "--model", str(model), "--dtype", "float32", "--out", str(out)])


def test_one_request_leaves_one_named_picture(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_cascade, tmp_path / "new" / "folder", "A red apple!", "--seed", "7") == 0
    assert pictures(tmp_path / "new" / "folder") == ["a-red-apple-7.png"]
    out, err = capsys.readouterr()
    assert "a-red-apple-7.png  seed 7" in out
    assert "steps 3" in out
    assert err == ""  # bars are for terminals


def test_the_picture_carries_every_setting(tiny_cascade: Path, tmp_path: Path) -> None:
    options = (
        "--negative",
        "sky",
        "--sampler",
        "euler",
        "--guidance",
        "2",
        "--size",
        "64x32",
        "--count",
        "2",
    )
    assert generate(tiny_cascade, tmp_path, "a star", "--seed", "3", *options) == 0
    stored = read_metadata(tmp_path / "a-star-4.png")
    assert (stored["seed"], stored["index"]) == (4, 1)
    request = stored["request"]
    assert request["negative"] == "sky"
    assert request["sampler"] == "euler"
    assert request["guidance"] == 2
    assert request["size"] == [64, 32]
    assert request["decoder_steps"] == 2
    assert request["dtype"] == "float32"


def test_nothing_is_overwritten(tiny_cascade: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert generate(tiny_cascade, tmp_path, "a star", "--seed", "3") == 0
    assert pictures(tmp_path) == ["a-star-3-2.png", "a-star-3.png"]
    first, second = ((tmp_path / name).read_bytes() for name in pictures(tmp_path))
    assert first == second


def test_like_repeats_a_picture_of_a_batch_bit_for_bit(tiny_cascade: Path, tmp_path: Path) -> None:
    assert generate(tiny_cascade, tmp_path / "a", "a star", "--seed", "3", "--count", "6") == 0
    for name in ("a-star-4.png", "a-star-8.png"):  # in the first batch of four and in the second of two
        like = str(tmp_path / "a" / name)
        assert run(["generate", "--like", like, "--out", str(tmp_path / name)]) == 0
        assert pictures(tmp_path / name) == [name]
        assert (tmp_path / name / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_like_repeats_pictures_of_several_prompts(tiny_cascade: Path, tmp_path: Path) -> None:
    from triptych import Cascade
    from triptych.images import save_png

    result = Cascade.load(tiny_cascade, dtype="float32").generate(["a star", "a red sky"], seeds=[5, 1])
    path = save_png(tmp_path, "second", result.images[1], result.metadata[1])
    assert run(["generate", "--like", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a-red-sky-1.png").read_bytes() == path.read_bytes()


def test_like_with_an_option_changes_that_one_thing(tiny_cascade: Path, tmp_path: Path) -> None:
    assert generate(tiny_cascade, tmp_path, "a star", "--seed", "3", "--count", "2", "--steps", "2") == 0
    like = str(tmp_path / "a-star-4.png")
    assert run(["generate", "--like", like, "--negative", "sky", "--out", str(tmp_path / "out")]) == 0
    assert pictures(tmp_path / "out") == ["a-star-4.png"]
    request = read_metadata(tmp_path / "out" / "a-star-4.png")["request"]
    assert (request["negative"], request["steps"], request["count"]) == ("sky", 2, 1)


def test_a_batch_and_a_single_picture_agree(tiny_cascade: Path, tmp_path: Path) -> None:
    assert generate(tiny_cascade, tmp_path / "four", "a star", "--seed", "3", "--count", "4") == 0
    assert generate(tiny_cascade, tmp_path / "one", "a star", "--seed", "5") == 0
    batch, alone = (
        np.asarray(Image.open(tmp_path / folder / "a-star-5.png")).astype(int) for folder in ("four", "one")
    )
    assert np.abs(batch - alone).max() <= 1


def test_json_stands_alone_on_standard_output(
    tiny_cascade: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_cascade, tmp_path, "ein Stern ☆", "--seed", "3", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert [Path(picture["path"]).name for picture in told["pictures"]] == pictures(tmp_path)
    assert told["request"]["prompt"] == "ein Stern ☆"
    assert set(told["timings"]) >= {
        "import",
        "load",
        "text",
        "stage_c",
        "stage_b",
        "stage_a",
        "save",
        "total",
    }


def test_a_drawn_seed_is_the_one_that_is_told(
    tiny_cascade: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_cascade, tmp_path, "a star", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    seed = told["request"]["seed"]
    assert told["pictures"][0]["seed"] == seed
    assert pictures(tmp_path) == [f"a-star-{seed}.png"]


def test_previews_are_kept_beside_the_one_png(tiny_cascade: Path, tmp_path: Path) -> None:
    assert generate(tiny_cascade, tmp_path, "a star", "--seed", "3", "--preview") == 0
    assert pictures(tmp_path) == ["a-star-3.png", "a-star-3.preview.jpg"]
    with Image.open(tmp_path / "a-star-3.preview.jpg") as preview:
        assert preview.size == (16, 16)


def test_bars_for_both_stages_on_a_terminal(tiny_cascade: Path, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    arguments = ["generate", "a star", "--model", str(tiny_cascade), "--out", str(tmp_path)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=writer, stdout=subprocess.DEVNULL)
    os.close(writer)
    content = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side has gone
        while piece := os.read(reader, 4096):
            content += piece
    os.close(reader)
    shown = content.decode()
    assert process.wait(timeout=120) == 0
    assert "Stage C" in shown
    assert "3/3" in shown
    assert "Stage B" in shown
    assert "2/2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "A prompt is needed"),
        (["generate", "x", "--model", "minj"], 'no model "minj"; did you mean "mini"'),
        (["generate", "x", "--sampler", "ddpn"], 'did you mean "ddpm"? Known: ddpm, ddim, euler'),
        (["generate", "x", "--size", "500x300", "TINY"], "nearest sizes are 496x296 and 504x304"),
        (["generate", "x", "--size", "12", "TINY"], "write width x height"),
        (["generate", "x", "--size", "400000x400000", "TINY"], "Not enough memory: "),
        (["generate", "x", "--steps", "0"], "steps = 0"),
        (["generate", "x", "--count", "many"], "--count"),
        (["generate", "x", "--stpes", "3"], "did you mean --steps?"),
        (["generate", "x", "--device", "tpu"], "device = 'tpu'"),
        (["generate", "x", "--device", "cuda:7", "TINY"], 'no device "cuda:7"'),
        (["generate", "x", "y"], "y"),
        (["generate", "x", "--stage-c", "5b", "TINY"], "5b"),
        (["generate", "x", "--stage-c", "STAGE_B", "TINY"], "Stage B"),
        (["generate", "x", "--stage-a", "TRUNCATED", "TINY"], "truncated"),
        (["generate", "x", "--stage-a", "PICKLE", "TINY"], "never opens them"),
        (["generate", "x", "--stage-a", "FOREIGN", "TINY"], "not of Stable Cascade"),
        (["generate", "x", "--stage-a", "NAN", "TINY"], "NaN or infinite, first in 'up_blocks.0.0.bias'"),
        (["generate", "x", "--stage-c", "NAN C", "TINY"], "NaN or infinite, first in 'clf.1.bias'"),
        (["generate", "--like", "absent.png"], "No such picture: absent.png"),
        (["generate", "--like", "PLAIN"], "holds no triptych settings"),
        (["generat", "x"], 'did you mean "generate"'),
        (["--colour"], "no option --colour"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tiny_cascade: Path,
    bad_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    filled = [str(bad_files.get(word, word)) for word in arguments if word != "TINY"]
    if "TINY" in arguments:
        filled += ["--model", str(tiny_cascade)]
    if filled[0] == "generate":
        filled += ["--out", str(out)]
    status = run(filled)
    said = capsys.readouterr()
    assert message in said.err
    assert status == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert pictures(out) == []


@pytest.fixture(scope="module")
def bad_files(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from safetensors.torch import save_file

    from triptych.checkpoints.files import read_tensors, write_part
    from triptych.checkpoints.headers import read_metadata as read_part_metadata

    folder = tmp_path_factory.mktemp("bad")
    good = tiny_cascade / "stage_a.safetensors"
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    torch.save({"a": torch.zeros(3)}, folder / "pickle.safetensors")
    save_file({"language.model": torch.zeros(3)}, folder / "foreign.safetensors")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(good).items()}
    tensors["up_blocks.0.0.bias"][0] = float("nan")
    write_part(folder / "nan.safetensors", tensors, read_part_metadata(good))
    good = tiny_cascade / "stage_c.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(good).items()}
    tensors["clf.1.bias"][0] = float("nan")
    write_part(folder / "nan-c.safetensors", tensors, read_part_metadata(good))
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    return {
        "STAGE_B": tiny_cascade / "stage_b.safetensors",
        "TRUNCATED": folder / "truncated.safetensors",
        "PICKLE": folder / "pickle.safetensors",
        "FOREIGN": folder / "foreign.safetensors",
        "NAN": folder / "nan.safetensors",
        "NAN C": folder / "nan-c.safetensors",
        "PLAIN": folder / "plain.png",
    }


def test_a_folder_that_cannot_be_is_told_before_the_work(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert generate(tiny_cascade, out, "x") == 2
        said = capsys.readouterr()
        assert str(out) in said.err
        assert said.err.count("\n") == 1


def test_a_folder_without_permission_is_told(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert generate(tiny_cascade, tmp_path, "x") == 2
    assert f"{tmp_path} may not be written" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_finished(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fill(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    assert generate(tiny_cascade, tmp_path, "x", "--seed", "1", "--count", "3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: The disk is full")
    assert "x-2.png" in error
    assert pictures(tmp_path) == ["x-1.png"]


def test_a_nearly_full_disk_is_told_before_the_work(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((1, 2)) and _Usage(1000))
    assert generate(tiny_cascade, tmp_path, "x") == 2
    said = capsys.readouterr().err
    assert "The disk is nearly full" in said
    assert said.count("\n") == 1


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_interrupting_keeps_what_is_finished(tiny_cascade: Path, tmp_path: Path) -> None:
    arguments = ["generate", "x", "--model", str(tiny_cascade), "--out", str(tmp_path)]
    many = ["--seed", "1", "--count", "500", "--batch", "1"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, *many],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A suite started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 100
    while not any(tmp_path.glob("x-*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"what was finished is kept" in err
    names = pictures(tmp_path)
    assert 0 < len(names) < 500
    for name in names:
        read_metadata(tmp_path / name)  # loads the whole picture


def test_a_defect_is_one_line_and_a_traceback_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("triptych.pipelines.cascade.Cascade.for_request", fail)
    assert run(["generate", "x", "--out", str(tmp_path)]) == 1
    assert "defect of triptych" in capsys.readouterr().err
    monkeypatch.setenv("TRIPTYCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["generate", "x", "--out", str(tmp_path)])


def test_help_needs_no_torch_and_shows_examples() -> None:
    code = (
        "import sys; from triptych.apps.cli.main import run; status = run(['generate', '--help']);"
        "assert status == 0; heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'triptych generate "a red apple"' in done.stdout


def test_a_picture_needs_no_transformers(tiny_cascade: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from triptych.apps.cli.main import run;"
        f"assert run(['generate', 'x', '--model', {str(tiny_cascade)!r}, '--out', {str(tmp_path)!r}]) == 0;"
        "heavy = {'transformers', 'diffusers', 'torch._dynamo', 'scipy', 'sympy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
