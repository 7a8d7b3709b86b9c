"""Updates inside the backward pass, per-layer clipping, and weights kept in bfloat16."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from triptych.models.stage_c import STAGE_C, StageC
from triptych.training.checkpointing import checkpoint_blocks, store_blocks
from triptych.training.fused import FusedUpdate, apply_gradients, round_at_random
from triptych.training.optim import OptimSettings, build_optimizer

INPUTS = {
    "x": torch.randn(2, 16, 4, 4),
    "t": torch.tensor([0.2, 0.7]),
    "text_hidden": torch.randn(2, 5, 384),
    "text_pooled": torch.randn(2, 384),
}


def stage_c() -> StageC:
    """A tiny Stage C that is no longer fresh: every weight gets a gradient."""
    torch.manual_seed(0)
    network = StageC(STAGE_C["tiny"])
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


def backward(network: nn.Module) -> float:
    loss = (network(**INPUTS) - INPUTS["x"]).square().mean()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("training", [False, True])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(training: bool) -> None:
    plain = stage_c().train(training)  # with dropout in training
    again = copy.deepcopy(plain)
    checkpoint_blocks(again)
    for network in (plain, again):
        torch.manual_seed(3)
        backward(network)
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or p.grad.equal(q.grad), name


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "adamw8bit"])
def test_an_update_inside_the_backward_pass_is_the_one_after_it(kind: str) -> None:
    settings = OptimSettings(kind=kind, clip=0.0)
    plain, fused = stage_c(), stage_c()
    checkpoint_blocks(fused)
    optimizers = [build_optimizer(network.parameters(), settings) for network in (plain, fused)]
    inside = FusedUpdate(optimizers[1], clip=0.0, seed=0)
    for step in range(3):
        backward(plain)
        gradients = [p.grad.norm() for p in plain.parameters() if p.grad is not None]
        optimizers[0].step()
        optimizers[0].zero_grad()
        with inside.step(step):
            backward(fused)
        assert all(p.grad is None for p in fused.parameters())
        assert inside.norm == pytest.approx(float(torch.stack(gradients).norm()), rel=1e-4)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-4, atol=1e-6)


def test_each_gradient_is_clipped_by_itself() -> None:
    network = nn.Linear(4, 3)
    inside = FusedUpdate(torch.optim.SGD(network.parameters(), lr=1.0), clip=0.1, seed=0)
    start = copy.deepcopy(network)
    with inside.step(0):
        (network(torch.ones(2, 4)).sum() * 10).backward()
    for p, q in zip(network.parameters(), start.parameters(), strict=True):
        assert float((p - q).detach().norm()) == pytest.approx(0.1)


def test_after_a_gradient_that_is_no_number_nothing_moves() -> None:
    network = nn.Linear(4, 3)
    start = copy.deepcopy(network)
    inside = FusedUpdate(torch.optim.SGD(network.parameters(), lr=1.0), clip=0.1, seed=0)
    with inside.step(7):
        (network(torch.ones(2, 4)).sum() * float("nan")).backward()
    assert math.isnan(inside.norm)
    for p, q in zip(network.parameters(), start.parameters(), strict=True):
        assert p.equal(q)
        assert p.grad is None


def test_rounding_at_random_is_right_on_average_and_repeats() -> None:
    x = torch.full((100_000,), 1 + 0.3 * 2**-7)  # 0.3 of the way between two neighbours
    rounded = round_at_random(x, 5)
    assert rounded.dtype == torch.bfloat16
    assert rounded.unique().tolist() == [1.0, 1 + 2**-7]
    assert float(rounded.float().mean() - 1) * 2**7 == pytest.approx(0.3, abs=0.01)
    assert rounded.equal(round_at_random(x, 5))
    assert not rounded.equal(round_at_random(x, 6))
    exact = torch.tensor([0.0, -1.5, 3e-30, -0.0])
    assert round_at_random(exact.bfloat16().float(), 0).equal(exact.bfloat16())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_too_small_for_bfloat16_still_add_up(fused: bool) -> None:
    parameter = nn.Parameter(torch.ones(400, 50, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=2**-13)  # a sixty-fourth of the distance to a neighbour
    inside = FusedUpdate(optimizer, clip=0.0, seed=1)
    for step in range(32):
        if fused:
            with inside.step(step):
                parameter.float().sum().backward()
        else:
            parameter.float().sum().backward()
            apply_gradients(optimizer, 1, step)
    assert parameter.dtype == torch.bfloat16
    assert parameter.grad is None
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 32 * 2**-13, abs=2e-4)


def test_bfloat16_weights_compute_as_if_they_were_wide_and_get_their_gradients() -> None:
    wide, stored = stage_c(), stage_c()
    store_blocks(stored, "bfloat16")
    with torch.no_grad():  # the same numbers, kept in float32
        for p, q in zip(wide.parameters(), stored.parameters(), strict=True):
            p.copy_(q)
    checkpoint_blocks(stored)
    assert backward(wide) == backward(stored)
    kinds = {q.dtype for q in stored.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}
    for (name, p), q in zip(wide.named_parameters(), stored.named_parameters(), strict=True):
        if p.grad is not None:
            assert q[1].grad.equal(p.grad.to(q[1].dtype)), name


def test_int8_is_for_weights_that_stay() -> None:
    network = stage_c()
    wanted = network(**INPUTS)
    network.requires_grad_(False)
    learned = network.down_blocks[0][0].channelwise[0].weight.requires_grad_(True)
    store_blocks(network, "int8", frozen_only=True)
    checkpoint_blocks(network)
    assert learned.dtype == torch.float32
    assert network.down_blocks[0][0].channelwise[4].weight.dtype == torch.int8
    got = network(**INPUTS)
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    got.sum().backward()
    assert learned.grad is not None
