"""On a CUDA device: precision, weights elsewhere, compiled networks. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from triptych import Cascade
from triptych.checkpoints.load import load_part
from triptych.pipelines.placement import Placement, Weights, choose_dtype, place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def answer(folder: Path, weights: Weights, dtype: torch.dtype, compiled: bool = False) -> torch.Tensor:
    network, _ = load_part(folder / "stage_b.safetensors", "stage_b")
    place(network, Placement(torch.device("cuda"), dtype, weights))
    run = torch.compile(network) if compiled else network
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    with torch.no_grad():
        return run(x, torch.tensor([0.5], device="cuda"), x.new_ones(1, 16, 2, 2), x.new_ones(1, 384)).float()


@pytest.mark.parametrize("weights", ["narrow", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_weights_give_the_same_numbers(
    narrow_cascade: Path, weights: Weights, dtype: torch.dtype
) -> None:
    assert torch.equal(answer(narrow_cascade, weights, dtype), answer(narrow_cascade, "resident", dtype))


def test_streamed_weights_leave_the_device(narrow_cascade: Path) -> None:
    network, _ = load_part(narrow_cascade / "stage_b.safetensors", "stage_b")
    place(network, Placement(torch.device("cuda"), torch.bfloat16, "streamed"))
    assert all(p.device.type == "cpu" for level in network.down_blocks for p in level.parameters())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_lower_precisions_stay_near(narrow_cascade: Path, dtype: torch.dtype, limit: float) -> None:
    exact = answer(narrow_cascade, "resident", torch.float32)
    assert (answer(narrow_cascade, "resident", dtype) - exact).abs().max() < limit * exact.abs().max()


def test_a_compiled_network_gives_the_same_numbers(narrow_cascade: Path) -> None:
    exact = answer(narrow_cascade, "resident", torch.float32)
    compiled = answer(narrow_cascade, "resident", torch.float32, compiled=True)
    assert torch.allclose(compiled, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_bfloat16_is_chosen_where_it_is_fast() -> None:
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_picture_is_the_one_of_the_cpu(tiny_cascade: Path) -> None:
    on_cpu = Cascade.load(tiny_cascade, device="cpu", dtype="float32").generate("a star", seed=1)
    on_gpu = Cascade.load(tiny_cascade, device="cuda", dtype="float32").generate("a star", seed=1)
    assert torch.allclose(on_cpu.latents_c, on_gpu.latents_c, atol=1e-2)
