"""`triptych convert`, `triptych info`, `triptych models` from the command line."""

from __future__ import annotations

import json

import pytest
import typer
from published_folders import write_official
from typer.testing import CliRunner

from triptych.apps.cli import convert, info, models
from triptych.errors import TriptychError


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("m") / "official")


def run(*arguments: object) -> str:
    """Output of a command; errors come out as they are raised."""
    app = typer.Typer()
    for module, name in ((convert, "convert"), (info, "info"), (models, "models")):
        app.command(name, help=module.HELP)(getattr(module, name))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, TriptychError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_info_names_part_layout_size_and_precision(official):
    facts = json.loads(run("info", official / "stage_b.safetensors", "--json", "--check"))
    assert facts["part"] == "stage_b"
    assert facts["layout"] == "official"
    assert facts["dtype"] == "F32"
    assert facts["numbers"] == "all finite"
    assert facts["config"]["widths"] == [16, 64]
    assert "parameters" in run("info", official / "stage_a.safetensors")


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "image_encoder/model.safetensors"])
def test_info_knows_the_towers(official, file):
    assert "transformers" in run("info", official / file)


def test_convert_goes_there_and_back(official, tmp_path):
    assert "diffusers layout" in run("convert", official, tmp_path / "d", "--to", "diffusers")
    assert "official layout" in run("convert", tmp_path / "d", tmp_path / "o")
    assert (tmp_path / "o" / "stage_c.safetensors").exists()


def test_convert_refuses_unknown_layouts_and_existing_files(official, tmp_path):
    with pytest.raises(TriptychError, match="did you mean"):
        run("convert", official, tmp_path / "x", "--to", "diffuser")
    with pytest.raises(TriptychError, match="bfloat16"):
        run("convert", official, tmp_path / "x", "--dtype", "bfloat")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(TriptychError, match="exists"):
        run("convert", official, tmp_path / "there")


def test_models_lists_the_named_ones():
    rows = json.loads(run("models", "--json"))
    assert [row["name"] for row in rows] == ["mini", "cascade", "cascade-lite"]
    assert rows[1]["memory"]["bfloat16"] > 7e9
    assert "cascade-lite" in run("models")
