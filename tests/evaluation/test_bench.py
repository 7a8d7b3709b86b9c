"""Speed against diffusers: the comparison is fair, and the floor is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from triptych.apps.cli.bench import table
from triptych.apps.cli.main import app
from triptych.evaluation import bench
from triptych.evaluation.bench import Bench, Measured, Plan, run_bench
from triptych.evaluation.floor import record_products, time_products
from triptych.pipelines.speed import Speed

PLAN = Plan(side=128, repeats=1, reduced=True)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured networks at their depth and pattern, narrow enough for a test."""
    stage_c = replace(bench.STAGE_C["1b"], widths=(32, 32), heads=(2, 2), cond_width=32)
    stage_b = replace(bench.STAGE_B["700m"], widths=(8, 16, 32, 32), heads=(0, 2, 2, 2), cond_width=32)
    stage_a = bench.STAGE_A["tiny"]
    monkeypatch.setattr(bench, "STAGE_C", {"1b": stage_c})
    monkeypatch.setattr(bench, "STAGE_B", {"700m": stage_b})
    monkeypatch.setattr(bench, "STAGE_A", {"full": stage_a})


def test_both_programs_answer_alike_in_the_run_that_times_them(narrow: None) -> None:
    result = run_bench(PLAN, torch.device("cpu"), torch.float32, lambda text: None)
    shown = result.as_json()
    assert set(shown["ratios"]) == {
        "stage_c_step", "stage_b_step", "stage_a_decode", "pipeline", "loading",
    }  # fmt: skip
    assert max(shown["difference"].values()) < 1e-4
    for case in ("stage_c_step", "stage_b_step", "stage_a_decode"):
        assert shown["floor"][case] > 0
    seconds = shown["seconds"]
    whole = 20 * seconds["stage_c_step"]["triptych"] + 10 * seconds["stage_b_step"]["triptych"]
    whole += seconds["stage_a_decode"]["triptych"]
    assert seconds["pipeline"]["triptych"] == pytest.approx(whole)
    json.dumps(shown)
    assert table(result).count("\n") == 2 + len(result.cases) + 1


def test_bfloat16_is_compared_by_distance_to_the_float32_result(narrow: None) -> None:
    result = run_bench(replace(PLAN, loading=False), torch.device("cpu"), torch.bfloat16, lambda text: None)
    errors = result.as_json()["errors"]
    assert set(errors) == {"stage_c_step", "stage_b_step"}  # Stage A computes in float32
    for case in errors.values():
        assert 0 < case["triptych"] < 1.2 * case["diffusers"] < 0.05
    assert "off float32" in table(result)


def test_the_products_of_a_call_are_its_matrix_products_and_attention() -> None:
    matrix, query = torch.randn(8, 8), torch.randn(1, 2, 4, 8)
    image, dense, depthwise = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 1, 1), torch.randn(3, 1, 3, 3)

    def call() -> None:
        matrix @ matrix
        matrix @ matrix
        F.scaled_dot_product_attention(query, query, query)
        F.gelu(matrix) + 1
        F.conv2d(image, dense)
        F.conv2d(image, depthwise, groups=3)

    products = record_products(call)
    names = {product.operator.overloadpacket.__name__: count for product, count in products.items()}
    attention = [name for name in names if "scaled_dot_product" in name]
    assert len(attention) == 1
    assert {name: count for name, count in names.items() if name not in attention} == {
        "mm": 2, "convolution": 1,
    }  # fmt: skip
    assert time_products(products) > 0


def test_ratios_are_theirs_over_ours() -> None:
    case = Measured({"triptych": 2.0, "diffusers": 3.0}, {"triptych": 0.0, "diffusers": 0.0}, floor=1.0)
    assert case.ratio() == 1.5
    assert case.above_floor() == 2.0


def test_time_below_the_floor_does_not_count_without_bounds() -> None:
    case = Measured({"triptych": 0.9, "diffusers": 1.5}, {"triptych": 0.0, "diffusers": 0.0}, floor=1.0)
    assert case.above_floor() == pytest.approx(0.5 / 0.01)


@pytest.mark.parametrize("switch", ["once", "fused", "share", "together"])
def test_both_programs_answer_alike_without_a_switch(narrow: None, switch: str) -> None:
    plan = replace(PLAN, loading=False, speed=replace(Speed(), **{switch: False}))
    result = run_bench(plan, torch.device("cpu"), torch.float32, lambda text: None)
    assert max(case.difference for case in result.cases.values()) < 1e-4
    assert f"without {switch}." in table(result)


def test_the_command_prints_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measured(plan: Plan, device: torch.device, dtype: torch.dtype, progress: Any) -> Bench:
        asked.append(plan)
        case = Measured({"triptych": 1.0, "diffusers": 2.0}, {"triptych": 0.0, "diffusers": 0.0})
        return Bench({"stage_c_step": case}, plan, "cpu", "float32", 1, 0, {"processor": "x", "torch": "y"})

    monkeypatch.setattr(bench, "run_bench", measured)
    result = CliRunner().invoke(app, ["bench", "--quick", "--no-loading", "--json"])
    assert json.loads(result.stdout)["ratios"] == {"stage_c_step": 2.0}
    assert asked == [Plan(512, 2, reduced=True, loading=False)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--quick", "--full"], "opposite"),
        (["--size", "1000"], "multiple of 128"),
        (["--without", "fusd"], "once, fused"),
        (["--into", "README.md"], "no place for the table"),
        (["--into", "absent.md"], "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code != 0
    assert sentence in str(result.exception) + result.output
