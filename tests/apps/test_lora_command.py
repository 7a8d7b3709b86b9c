"""`triptych lora`: info, convert, merge and extract on the packaged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from triptych.apps.cli.main import run
from triptych.checkpoints.catalog import package_folder
from triptych.checkpoints.files import PartInfo, read_metadata
from triptych.checkpoints.load import load_part
from triptych.checkpoints.lora import Lora
from triptych.checkpoints.lora_keys import official_targets
from triptych.checkpoints.lora_write import write_lora
from triptych.models.lora import Change

MINI = package_folder("mini")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    network, _ = load_part(MINI / "stage_c.safetensors", "stage_c")
    torch.manual_seed(0)
    changes = []
    for target in official_targets(network.state_dict())[:2]:
        rows, columns = network.get_parameter(f"{target}.weight").shape
        changes.append(Change(target, "lora", {"up": torch.randn(rows, 2), "down": torch.randn(2, columns)}))
    info = PartInfo("lora", licence="CC-BY-4.0", notice="drawn by A")
    write_lora(
        tmp_path / "dog.safetensors", Lora({"stage_c": changes}, {"[dog]": torch.randn(1, 384)}, info=info)
    )
    return tmp_path / "dog.safetensors"


def test_info_says_kind_rank_tokens_and_model(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lora", "info", str(lora), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["for"], facts["kind"], facts["rank"]) == ("mini", "lora", 2)
    assert facts["tokens"] == {"[dog]": 1}
    assert facts["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui", "onetrainer"])
def test_convert_there_and_back(lora: Path, tmp_path: Path, layout: str, capsys) -> None:
    assert run(["lora", "convert", str(lora), str(tmp_path / "x.safetensors"), "--to", layout]) == 0
    assert run(["lora", "convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]) == 0
    assert run(["lora", "info", str(tmp_path / "y.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out[-2000:].split("\n", 2)[-1])
    assert facts["tokens"] == {"[dog]": 1}
    assert run(["lora", "convert", str(lora), str(tmp_path / "x.safetensors")]) == 2
    assert "exists" in capsys.readouterr().err


def test_merging_and_extracting_again_gives_the_change_back(lora: Path, tmp_path: Path, capsys) -> None:
    merged = tmp_path / "merged.safetensors"
    assert run(["lora", "merge", str(merged), "--lora", f"{lora}:0.5"]) == 0
    assert "Not merged" in capsys.readouterr().err
    info = read_metadata(merged)
    assert info.licence.endswith("; CC-BY-4.0")
    assert info.settings == read_metadata(MINI / "stage_c.safetensors").settings
    out = tmp_path / "again.safetensors"
    assert (
        run(["lora", "extract", str(MINI / "stage_c.safetensors"), str(merged), str(out), "--rank", "2"]) == 0
    )
    assert "2 matrices" in capsys.readouterr().out
    assert run(["lora", "merge", str(tmp_path / "twice.safetensors"), "--lora", str(out)]) == 0
    first, _ = load_part(merged, "stage_c")
    second, _ = load_part(tmp_path / "twice.safetensors", "stage_c")
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=1e-2, atol=1e-2)
    assert run(["lora", "extract", str(merged), str(MINI / "stage_b.safetensors"), str(tmp_path / "n")]) == 2
