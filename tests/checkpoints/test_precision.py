"""float16 overflows in these networks; the repaired ones do not, and compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from triptych.checkpoints.precision import CEILING, probe_peaks, repair_float16
from triptych.models.stage_b import StageB, StageBConfig
from triptych.models.stage_c import STAGE_C, StageC, StageCConfig
from triptych.models.trunk import Trunk

DEEP_C = StageCConfig(
    widths=(64, 64),
    heads=(2, 2),
    cond_width=32,
    down_blocks=(2, 3),
    up_blocks=(3, 2),
    text_width=24,
    pooled_width=24,
    image_width=16,
)
DEEP_B = StageBConfig(
    widths=(16, 32, 32),
    heads=(0, 0, 2),
    patterns=("CT", "CT", "CTA"),
    down_blocks=(1, 2, 2),
    up_blocks=(2, 2, 1),
    down_repeats=(1, 1, 1),
    up_repeats=(2, 3, 2),
    cond_width=32,
    pooled_width=24,
    dropout=(0.0, 0.0, 0.0),
    self_attention=(True, True, True),
)


def random_network(config: StageBConfig | StageCConfig, seed: int = 0) -> Trunk:
    torch.manual_seed(seed)
    network = StageC(config) if isinstance(config, StageCConfig) else StageB(config)
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(network: Trunk, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    config = network.config
    t = torch.tensor([0.9, 0.3])
    if isinstance(network, StageC):
        return {
            "x": normal(16, 5, 6),
            "t": t,
            "text_hidden": normal(7, config.text_width),
            "text_pooled": normal(config.pooled_width),
        }
    return {
        "x": normal(4, 20, 28),
        "t": t,
        "semantic": normal(16, 3, 4),
        "text_pooled": normal(config.pooled_width),
    }


def inflate(network: Trunk, levels: tuple[str, ...], factor: float) -> None:
    """Let the stream grow by making what blocks of some levels add to it large."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(levels) and ".channelwise.4." in name:
                parameter *= factor


def run(network: Trunk, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    narrow = {name: value if name == "t" else value.to(dtype) for name, value in given.items()}
    with torch.no_grad():
        return network.to(dtype)(**narrow).float()


# A skip is read without a norm, so inside the block that reads it no repair can make numbers smaller: where
# every level grows, each grows less.
CASES = [
    pytest.param(DEEP_C, ("up_blocks.1",), 3e4, id="stage C, last level"),
    pytest.param(DEEP_C, ("down_blocks.0",), 3e4, id="stage C, first level and its skip"),
    pytest.param(DEEP_C, ("down_blocks.1", "up_blocks.0"), 3e4, id="stage C, deepest levels"),
    pytest.param(DEEP_C, ("down_blocks", "up_blocks"), 3e4, id="stage C, everywhere"),
    pytest.param(DEEP_B, ("up_blocks.1",), 3e4, id="stage B, a repeated level"),
    pytest.param(DEEP_B, ("up_blocks.0",), 3e4, id="stage B, the deepest repeated level"),
    pytest.param(DEEP_B, ("down_blocks", "up_blocks"), 6e3, id="stage B, everywhere"),
]


@pytest.mark.parametrize(("config", "levels", "factor"), CASES)
def test_float16_overflows_and_the_repaired_network_does_not(config, levels, factor):
    def build() -> Trunk:
        network = random_network(config)
        inflate(network, levels, factor)
        return network

    given = inputs(build())
    exact = run(build(), given, torch.float32)
    assert not run(build(), given, torch.float16).isfinite().all(), "the plain network should overflow"

    assert repair_float16(build())
    error = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fresh = build()
        repair_float16(fresh)
        got = run(fresh, given, dtype)
        assert got.isfinite().all()
        error[dtype] = float((got - exact).abs().max() / exact.abs().max())
    print(", ".join(f"{dtype}: {value:.1e}" for dtype, value in error.items()))
    assert error[torch.float32] < 1e-6
    assert error[torch.float16] < 1e-2
    assert error[torch.bfloat16] < 8e-2


@pytest.mark.parametrize("config", [DEEP_C, DEEP_B])
def test_a_quiet_network_is_left_as_it_is(config):
    network = random_network(config)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert repair_float16(network) == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_after_the_repair_no_number_of_the_stream_is_above_the_ceiling():
    network = random_network(DEEP_C)
    inflate(network, ("up_blocks",), 1e5)
    assert max(probe_peaks(network).values()) > 65504
    repair_float16(network)
    assert max(probe_peaks(network).values()) <= CEILING


def test_the_repair_depends_on_the_weights_alone_and_is_done_once():
    scales = []
    for seed in (3, 4):
        network = random_network(DEEP_C)
        inflate(network, ("up_blocks",), 1e5)
        torch.manual_seed(seed)
        scales.append(repair_float16(network))
        assert repair_float16(network) == {}
    assert scales[0] == scales[1]
    assert all(scale < 1 and (1 / scale).is_integer() for scale in scales[0].values())


def test_bfloat16_weights_are_probed_block_by_block_and_keep_their_precision():
    network = random_network(DEEP_C)
    inflate(network, ("up_blocks",), 1e5)
    wide = probe_peaks(network)
    network.bfloat16()
    narrow = probe_peaks(network)
    assert all(parameter.dtype == torch.bfloat16 for parameter in network.parameters())
    assert all(narrow[name] == pytest.approx(peak, rel=0.2) for name, peak in wide.items())
    repair_float16(network)
    assert all(parameter.dtype == torch.bfloat16 for parameter in network.parameters())


def test_controlnet_residuals_are_scaled_with_the_stream():
    def build() -> StageC:
        network = random_network(DEEP_C)
        inflate(network, ("down_blocks", "up_blocks"), 3e4)
        return network

    given = inputs(build())
    generator = torch.Generator().manual_seed(5)
    residuals = [3e4 * torch.randn(2, 64, 5, 6, generator=generator) for _ in range(8)]
    residuals[3] = None
    network = build()
    with torch.no_grad():
        plain = network(**given, residuals=residuals)
        repair_float16(network)
        named = network(**given, residuals=residuals)
        placed = network(given["x"], given["t"], given["text_hidden"], given["text_pooled"], None, residuals)
        without = network(**given)
    torch.testing.assert_close(named, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(named, placed)
    assert (without - plain).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_depth_and_width_is_finite(size, dtype):
    """Random weights at published size, 4x4 latents: 5 GB, and slow where bfloat16 is emulated."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = StageC(STAGE_C[size]).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name == "clf.1.weight":
                parameter.normal_(std=0.02)
            elif ".channelwise.4.weight" in name and name.startswith("up_blocks.1"):
                parameter *= 2e5
    given = inputs(network)
    given["x"] = given["x"][:, :, :4, :4]
    if dtype == torch.float16:
        assert repair_float16(network)
    assert run(network, given, dtype).isfinite().all()
