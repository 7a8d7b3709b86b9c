"""What the documents say is so: commands parse, files exist, the Python example runs, help is up to date."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from triptych.apps.cli.main import app

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
    _, name, *arguments = shlex.split(command)
    assert name in root.commands
    root.commands[name].make_context(name, arguments)  # raises for an unknown or missing option


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"^\| `((?:triptych|recipes|tests|benchmarks)/[\w/.]*)` \|", text, re.MULTILINE)
    for link in links:
        assert (document.parent / link).exists(), link
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_python_example_runs(
    tiny_cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = code("python", README)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace('"mini"', repr(str(tiny_cascade))), "README.md", "exec"), {})
    assert (tmp_path / "apple.png").exists()
    assert "stage_c 1 3" in capsys.readouterr().out


def test_the_page_of_commands_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cli_docs

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_docs.render(), "run `python scripts/cli_docs.py`"
    sys.modules.pop("cli_docs")
