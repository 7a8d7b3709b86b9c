"""What `triptych doctor` foretells, against figures measured elsewhere and files that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.tiny_cascade import write_tiny_cascade
from triptych.apps.cli.main import app
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.capacity import Plan, peak
from triptych.pipelines.forecast import count_operations, forecast
from triptych.pipelines.needs import Need

CPU = torch.device("cpu")


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_operations_of_full_size_steps_are_those_that_were_measured() -> None:
    with torch.device("meta"):
        stage_c, stage_b = StageC(STAGE_C["1b"]), StageB(STAGE_B["700m"])
    guided = count_operations(
        stage_c, on_meta(2, 16, 24, 24), on_meta(2), on_meta(2, 77, 1280), on_meta(2, 1, 1280)
    )
    single = count_operations(
        stage_b, on_meta(1, 4, 256, 256), on_meta(1), on_meta(1, 16, 24, 24), on_meta(1, 1, 1280)
    )
    assert guided == pytest.approx(2.2e12, rel=0.1)
    assert single == pytest.approx(2.15e12, rel=0.1)


def test_published_models_are_foretold_without_their_files() -> None:
    lite, full = (
        forecast(name, CPU, torch.float32, free=10**12, speed=1e11) for name in ("cascade-lite", "cascade")
    )
    assert lite.plan is not None
    assert lite.plan.keep
    assert 1.0e9 < lite.needs[1].numbers < 1.06e9
    assert 3.5e9 < full.needs[1].numbers < 3.7e9
    assert full.stored > lite.stored
    assert full.peak > lite.peak
    assert full.seconds > lite.seconds
    tight = forecast("cascade", CPU, torch.float32, free=int(6e9), speed=1e11)
    assert tight.plan is not None
    assert not tight.plan.keep
    assert tight.peak <= 6e9
    assert "streamed" in tight.plan.weights.values()
    rounded = forecast("cascade", CPU, torch.float32, free=6 * 2**30, speed=1e11, int8=None)
    assert rounded.plan is not None
    assert rounded.plan.weights["stage_c"] == "int8"
    none = forecast("cascade", CPU, torch.float32, free=10**8, speed=1e11)
    assert none.plan is None
    assert 10**8 < none.peak < 3 * 2**30


def test_a_model_on_disk_is_counted_from_its_files(tmp_path: Path) -> None:
    folder = write_tiny_cascade(tmp_path)
    one = forecast(str(folder), CPU, torch.float32, free=10**12, speed=1e11)

    numbers = sum(tensor.numel() for tensor in load_file(folder / "stage_c.safetensors").values())
    assert next(need for need in one.needs if need.stage == "stage_c").numbers == numbers


def test_the_peak_of_a_plan_is_its_fullest_stage() -> None:
    needs = [Need("a", 100, 200, 10, 5, 1000), Need("b", 50, 100, 10, 5, 3000)]
    together = Plan({"a": "resident", "b": "resident"}, keep=True)
    apart = Plan({"a": "resident", "b": "streamed"}, keep=False)
    assert peak(needs, together) == 150 * 4 + 3000
    assert peak(needs, apart) == 15 * 4 + 3000


def test_the_command_tells_machine_models_and_extras(tmp_path: Path) -> None:
    folder = write_tiny_cascade(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--model", str(folder), "--json"])
    told = json.loads(result.stdout)
    assert told["device"]
    assert told["operations_per_second"] > 0
    assert told["models"][0]["fits"]
    assert told["models"][0]["peak_bytes"] > 0
    assert set(told["extras"]) == {"train", "control", "eval", "compare", "serve"}
    shown = CliRunner().invoke(app, ["doctor", "--model", str(folder), "--size", "256x256"]).stdout
    assert "256x256" in shown
    assert "GFLOPS" in shown
