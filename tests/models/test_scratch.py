"""Networks in sampling work in place, keep results between steps, share equal branches: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.models import blocks, fused, scratch
from triptych.models.blocks import AttentionBlock, ConvBlock, FeedForwardBlock
from triptych.models.scratch import Scratch
from triptych.models.stage_a import STAGE_A, StageA
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.speed import missing_compiler


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomised(network: Any) -> Any:
    """Random weights in every tensor, those that are zero at birth included."""
    for index, parameter in enumerate(network.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(normal(*parameter.shape, seed=index) / fan_in**0.5)
    return network.eval()


@pytest.fixture(params=["whole", "in spans"])
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps in one piece, and in pieces that end in the middle of rows of positions and of samples."""
    if request.param == "in spans":
        monkeypatch.setattr(scratch, "SPAN_BYTES", 2048)
        monkeypatch.setattr(fused, "LEAST_ROWS_PER_WIDTH", 0)
        monkeypatch.setattr(fused, "CACHED", 5 * 64)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


STAGES = {
    "stage_c": (
        StageC(STAGE_C["tiny"]),
        {"text_hidden": normal(2, 9, 384), "text_pooled": normal(2, 384)},
        16,
    ),
    "stage_c of mini's kind": (
        StageC(replace(STAGE_C["tiny"], extra_times=(), pooled_modulation=True, positions=True)),
        {"text_hidden": normal(2, 9, 384), "text_pooled": normal(2, 1, 384)},
        16,
    ),
    "stage_b": (
        StageB(replace(STAGE_B["tiny"], semantic_unfold=2)),
        {"semantic": normal(2, 16, 3, 2), "text_pooled": normal(2, 1, 384)},
        4,
    ),
}


@pytest.fixture(params=list(STAGES))
def stage(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A network, conditions of two branches, and a map for one."""
    network, cond, channels = STAGES[request.param]
    return randomised(network), cond, normal(1, channels, 6, 10, seed=5)


def ask(network: Any, x: Tensor, cond: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return network(x, torch.full((len(x),), 0.7), **cond, **more)


def test_working_in_place_gives_the_numbers_of_training(stage, spans: None) -> None:
    network, cond, x = stage
    x = torch.cat([x, 2 * x])
    before = x.clone()
    with torch.enable_grad():
        want = network(x, torch.full((2,), 0.7), **cond).detach()
    assert_same(ask(network, x, cond), want)
    assert_same(ask(network, x, cond, scratch=Scratch(fused=False)), want)
    assert torch.equal(x, before)


@pytest.mark.parametrize("pictures", [1, 2])
def test_equal_branches_part_where_their_conditions_enter(stage, spans: None, pictures: int) -> None:
    network, cond, x = stage
    if pictures == 2:
        x, cond = torch.cat([x, 2 * x]), {name: torch.cat([value, -value]) for name, value in cond.items()}
    want = ask(network, torch.cat([x, x]), cond)
    assert_same(ask(network, x, cond), want)
    assert_same(ask(network, x, cond, scratch=Scratch(fused=False)), want)


@pytest.mark.parametrize("skip_until", [0, 3])
def test_residuals_meet_shared_branches(skip_until: int) -> None:
    network, cond, _ = STAGES["stage_c"]
    network, x = randomised(network), normal(1, 16, 5, 4)
    residuals = [None] * skip_until + [normal(1, 32, 3, 3, seed=6)]
    both = [None if one is None else torch.cat([one, one]) for one in residuals]
    want = ask(network, torch.cat([x, x]), cond, residuals=both)
    assert_same(ask(network, x, cond, residuals=residuals), want)


def test_what_is_kept_serves_every_step_and_time(stage) -> None:
    network, cond, x = stage
    kept = Scratch(times=(0.9, 0.4))
    with torch.no_grad():
        for time in (0.9, 0.4, 0.55, 0.9):  # one of them was not foreseen
            kept.at(time)
            told = torch.full((1,), time)
            assert_same(network(x, told, **cond, scratch=kept), network(x, told, **cond))


def calls(module: nn.Module) -> list[int]:
    """Grows by one whenever the module runs."""
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_conditions_are_read_once_in_a_run() -> None:
    network = randomised(StageC(STAGE_C["tiny"]))
    block = next(block for block in network.modules() if isinstance(block, AttentionBlock))
    counts = [calls(module) for module in (network.clip_txt_mapper, block.kv_mapper)]
    kept, cond = Scratch(times=(0.9, 0.4)), STAGES["stage_c"][1]
    for time in kept.times:
        kept.at(time)
        ask(network, normal(1, 16, 3, 3), cond, scratch=kept)
    assert [len(count) for count in counts] == [1, 1]


def test_memory_of_what_is_kept_is_bounded(stage) -> None:
    network, cond, x = stage
    tight = Scratch(limit=5000)
    assert_same(ask(network, x, cond, scratch=tight), ask(network, x, cond))
    assert_same(ask(network, x, cond, scratch=tight), ask(network, x, cond))
    assert tight.used <= 5000


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it imports its compiler
def test_a_compiled_block_gives_the_same_and_serves_its_kind() -> None:
    from torch._dynamo.utils import counters

    made: list[int] = []
    network = [randomised(ConvBlock(8)) for _ in range(3)]
    x = normal(1, 8, 3, 4).to(memory_format=torch.channels_last)
    for index, block in enumerate(network):
        with torch.no_grad():
            want = block(x)
            assert_same(block(x, scratch=Scratch(fused=False, compiled=True)), want)
        made.append(counters["stats"]["unique_graphs"])
        assert made[-1] == made[0], f"block {index} was compiled anew"


@pytest.mark.parametrize(("device", "spans"), [("cpu", True), ("meta", False)])
@pytest.mark.parametrize("kind", [ConvBlock, FeedForwardBlock])
def test_spans_stay_where_they_are_faster_than_compiled_blocks(
    kind: type[nn.Module], device: str, spans: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def note(name: str) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            ran.append(name)
            return torch.empty(1, 8, 4, 4)

        return run

    monkeypatch.setattr(blocks, "run_compiled", note("compiled"))
    monkeypatch.setattr(blocks, "overwrite", note("spans"))
    block, x = kind(8).to(device), torch.empty(1, 8, 4, 4, device=device)
    with torch.no_grad():
        block(x, scratch=Scratch(compiled=True))
        block(x, scratch=Scratch(fused=False, compiled=True))
        block(x, scratch=Scratch())
    assert ran == ["spans" if spans else "compiled", "compiled", "spans"]


@pytest.mark.parametrize("block", [ConvBlock(8), ConvBlock(8, 4), FeedForwardBlock(8)])
def test_linear_layers_that_are_more_than_that_are_not_gone_around(block: nn.Module) -> None:
    """An adapter, say, has to act."""

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    randomised(block)
    last = block.channelwise[4]
    block.channelwise[4] = Doubling(last.in_features, last.out_features)
    block.channelwise[4].load_state_dict(last.state_dict())
    x = normal(2, 8, 3, 4)
    more = (
        (normal(2, 4, 3, 4),) if isinstance(block, ConvBlock) and block.channelwise[0].in_features > 8 else ()
    )
    with torch.no_grad():
        want = block(x, *more)
        got = block(x.clone(), *more, scratch=Scratch())
    assert torch.equal(got, want)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (2, 3)])
def test_stage_a_in_place_and_in_bands_equals_whole(height: int, width: int, spans: None) -> None:
    network = randomised(StageA(STAGE_A["tiny"]))
    latents = normal(2, 4, height, width)
    pixels = torch.rand(2, 3, 4 * height, 4 * width)
    want = network.decode(latents).detach(), network.encode(pixels).detach()  # with gradients: the plain way
    with torch.no_grad():
        assert_same(network.decode(latents), want[0])
        assert torch.equal(network.decode(latents, fused=False), want[0])
        assert_same(network.encode(pixels), want[1])


@pytest.mark.parametrize("name", list(STAGES))
def test_reused_deep_levels_are_those_of_the_step_before(name: str) -> None:
    """Put together by hand: shallow levels of the second input around the deep answer to the first."""
    network, conditions, channels = STAGES[name]
    network = randomised(network)
    first, second = normal(2, channels, 6, 8, seed=5), normal(2, channels, 6, 8, seed=6)
    t, later = torch.full((2,), 0.7), torch.full((2,), 0.6)
    deep: list[Tensor] = []

    class Told(Scratch):
        """Hands out at the second call what it was given at the first."""

        def deep(self, make: Any) -> Tensor:
            if not deep:
                deep.append(make().clone())
            return deep[0]

    with torch.no_grad():
        by_hand = Told(once=False, fused=False)
        network(first, t, **conditions, scratch=by_hand)
        want = network(second, later, **conditions, scratch=by_hand)
        plain = network(second, later, **conditions)
        for fused_blocks in (True, False):
            scratch = Scratch(once=False, fused=fused_blocks, reuse=2)
            network(first, t, **conditions, scratch=scratch)
            assert_same(network(second, later, **conditions, scratch=scratch), want)
            assert_same(network(second, later, **conditions, scratch=scratch), plain)  # the third is due anew
    assert float((want - plain).abs().max()) > 1e-3
