"""What the documents say is so: commands parse, those of the README run, files exist, help is up to date."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import published_folders
import pytest
import typer
from PIL import Image

from triptych.apps.cli.main import app, run
from triptych.checkpoints import hub

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every triptych command of the documents, in fenced and in indented code."""
    found: list[str] = []
    for document in DOCUMENTS:
        for line in document.read_text(encoding="utf-8").splitlines():
            match = re.match(r"(?:    |pip install -e \. && )?(triptych .*)", line)
            if match and not line.startswith("triptych:"):
                found.append(match[1])
    return found


def test_the_first_two_commands_are_the_promised_ones() -> None:
    first, second = (block.strip() for block in code("sh", README)[:2])
    assert first == 'pip install -e . && triptych generate "a red apple"'
    assert second == "pip install -e '.[test]' && pytest"


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_of_the_documents_is_understood(command: str) -> None:
    root: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(command, comments=True)
    assert name in root.commands
    root.commands[name].make_context(name, arguments)  # raises for an unknown or missing option


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"^\| `((?:triptych|recipes|tests|benchmarks)/[\w/.]*)` \|", text, re.MULTILINE)
    links += re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        assert (document.parent / link).exists(), link
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the README's commands run, one after the other: a folder beside the recipes of a clone, and a
    hub cache that already holds a (tiny) cascade-lite."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "clone").mkdir()
    (folder / "clone" / "recipes").symlink_to(ROOT / "recipes")
    published_folders.write_hub_cache(folder / "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "cache_folder", lambda: folder / "hub")
        patch.chdir(folder / "clone")
        yield folder / "clone"


INSTALLS = ("pip install -e .", "pip install -e '.[test]'", "pytest")
PICTURES = [f"pictures/a-blue-star-{seed}.png" for seed in (7, 8, 9, 10)]
# What a command of the README leaves, with the packaged mini.
LEAVES = {
    'triptych generate "a red apple"': ["*.png"],
    'triptych generate "a blue star" --count 4 --seed 7 --out pictures': PICTURES,
    "triptych generate --like pictures/a-blue-star-8.png": ["a-blue-star-8.png"],
    "triptych vary pictures/a-blue-star-8.png --count 4": ["a-blue-star-8-*.png"],
    'triptych img2img pictures/a-blue-star-8.png "a red heart" --strength 0.6': ["a-red-heart-*.png"],
    "triptych train recipes/tiny/stage_c.toml --set out=runs/try": ["runs/try/*.safetensors"],
    "triptych evaluate shapes": [],
    "triptych convert cascade-lite lite-diffusers --to diffusers": [
        "lite-diffusers/stable-cascade/model_index.json",
        "lite-diffusers/stable-cascade-prior/model_index.json",
    ],
    "triptych doctor": [],
}
MORE = {  # all 300 pictures take too long, as do the operations of the full-size networks
    "triptych evaluate shapes": "--count 1",
    "triptych doctor": "--model mini",
}


def readme_lines() -> list[str]:
    """The README's shell commands in order, `a && b` as two."""
    lines = "".join(code("sh", README)).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_every_shell_command_of_the_readme_is_known_here() -> None:
    assert [line for line in readme_lines() if line not in INSTALLS] == list(LEAVES)


@pytest.mark.parametrize("command", LEAVES)
def test_a_command_of_the_readme_runs(
    command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *arguments = shlex.split(f"{command} {MORE.get(command, '')}")
    status = run(arguments)
    assert status == 0, capsys.readouterr().err
    for pattern in LEAVES[command]:
        assert list(workplace.glob(pattern)), pattern
    if "--like" in command:
        again, first = (workplace / name for name in ("a-blue-star-8.png", "pictures/a-blue-star-8.png"))
        with Image.open(again) as one, Image.open(first) as other:
            assert one.tobytes() == other.tobytes()


def test_the_python_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = code("python", README)
    exec(compile(example, "README.md", "exec"), {})
    assert (workplace / "apple.png").exists()
    assert re.search(r"^stage_c 1 \d+$", capsys.readouterr().out, re.MULTILINE)


def test_the_page_of_commands_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cli_docs

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_docs.render(), "run `python scripts/cli_docs.py`"
    sys.modules.pop("cli_docs")
