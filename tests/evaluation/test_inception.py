"""Inception's features, FID and KID equal what pytorch-fid and torch-fidelity made of the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from formula_weights import weights_by_formula
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from triptych.apps.cli.main import run
from triptych.errors import CheckpointError
from triptych.evaluation.features import features_of, open_features
from triptych.models.inception import Inception, layout

RECORDED = Path(__file__).parents[1] / "reference" / "inception.safetensors"
FILE = "pt_inception-2015-12-05-6726825d.safetensors"


def told(name: str) -> dict:
    with safe_open(RECORDED, "pt") as file:
        return json.loads(file.metadata()[name])


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of weights, and beside it the recorded pictures as two folders."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "inception").mkdir()
    file = folder / "inception" / FILE
    save_file(weights_by_formula(told("layout")), file)
    recorded = load_file(RECORDED)
    for name in ("real", "made"):
        (folder / name).mkdir()
        for number, shown in enumerate(recorded[f"{name} pictures"]):
            Image.fromarray(shown.numpy()).save(folder / name / f"{number}.png")
    yield folder
    file.unlink()  # 96 MB


def test_the_layout_is_that_of_the_published_file() -> None:
    assert {name: list(shape) for name, shape in layout().items()} == told("layout")
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 21_785_568


def test_features_equal_pytorch_fids(judges: Path) -> None:
    network = open_features("inception", weights=judges)
    for name, recorded in load_file(RECORDED).items():
        if name.endswith("features"):
            found = features_of(judges / name.split()[0], network)
            assert found.shape == recorded.shape == (5, 2048)
            assert torch.allclose(found, recorded, rtol=1e-4, atol=1e-4)


def test_the_command_gives_the_fid_of_pytorch_fid_and_the_kid_of_torch_fidelity(
    judges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--data", str(judges / "real"), "--pictures", str(judges / "made")]
    arguments = ["evaluate", "distances", *sets, "--features", "inception", "--weights", str(judges)]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    numbers = told("numbers")
    # Their matrix root of a singular product is the less exact of the two.
    assert found["frechet"] == pytest.approx(numbers["fid"], rel=1e-3)
    assert found["kernel"] == pytest.approx(numbers["kid"], rel=1e-4)
    assert found["features"] == "inception"
    assert run([*arguments, "--count", "2"]) == 0
    printed = capsys.readouterr().out
    assert "frechet (FID)" in printed
    assert "kernel (KID)" in printed


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inception").mkdir()
    shapes = {**layout(), "fc.weight": (1000, 2048), "fc.bias": (1000,), "AuxLogits.fc.bias": (1000,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "inception" / FILE)
    with pytest.raises(
        CheckpointError, match=r"3 names or shapes differ \(AuxLogits.fc.bias .* not in the network"
    ):
        open_features("inception", weights=tmp_path)


def test_a_pickle_is_not_opened_and_the_way_to_safetensors_is_told(tmp_path: Path) -> None:
    (tmp_path / "inception").mkdir()
    (tmp_path / "inception" / FILE.replace("safetensors", "pth")).write_bytes(b"not opened")
    with pytest.raises(CheckpointError, match=r"needs weights \(96 MB\).*weights_only=True") as told:
        open_features("inception", weights=tmp_path)
    assert "python -c" in str(told.value)
    assert open_features("inception,mobilenet").name == "mobilenet"  # because that was asked for
