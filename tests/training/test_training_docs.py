"""docs/training.md as a user would follow it: its commands run in order, at tiny size."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tiny_cascade import write_tiny_cascade

from triptych.apps.cli.main import run
from triptych.training.config import read_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("triptych")  # torchrun's are run by test_processes.py
]
SHORT = "--set steps=2 --set batch=2 --set tensorboard=false --set sample_every=2 --set save_every=2"
OF_TINY = " ".join(f"--set parts.{part}=tiny/{part}.safetensors" for part in
                   ("stage_a", "stage_c", "semantic", "text_encoder", "previewer"))  # fmt: skip
SMALLER = {  # what makes a command quick without changing what it does
    "triptych prepare": "",
    "triptych train": SHORT,
    "triptych train recipes/tiny/controlnet": f"{SHORT} {OF_TINY}",
    "triptych train --recipe lora": f"{SHORT} --set optim.schedule=constant --model tiny",
    "triptych train finetune.toml": f"{SHORT} --set init=tiny",
    "triptych generate": "--model tiny",
    "triptych canny": "--model tiny",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("training-docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "tiny").mkdir()
    write_tiny_cascade(folder / "tiny")
    (folder / "my_pictures").mkdir()
    for number in range(5):
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((10 + 4 * number, 20, 60 + 4 * number, 80), fill="teal")
        image.save(folder / "my_pictures" / f"{number}.png")
        image.save(folder / "sketch.png")
    (toml,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (folder / "finetune.toml").write_text(toml, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_the_page_goes_from_pictures_to_every_kind_of_training(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        smaller = max((key for key in SMALLER if command.startswith(key)), key=len)
        _, *arguments = shlex.split(f"{command} {SMALLER[smaller]}")
        assert run(arguments) == 0, (command, capsys.readouterr().err)
    assert (workplace / "runs" / "mydog" / "report.html").is_file()
    assert (workplace / "runs" / "finetuned" / "stage_c.safetensors").is_file()
    assert len(list(workplace.glob("*.png"))) == 4  # the sketch, and one from each generation


def test_settings_of_the_page_exist() -> None:
    settings = read_settings(ROOT / "recipes" / "tiny" / "lora.toml")
    for table, name in re.findall(r"`(data|diffusion|lora|optim)\.(\w+)", PAGE):
        assert hasattr(getattr(settings, table), name), f"{table}.{name}"
