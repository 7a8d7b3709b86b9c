"""The optimiser, the learning rate over a run, clipping and the running average."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from triptych.errors import TrainingError
from triptych.training.optim import (
    EmaSettings,
    OptimSettings,
    build_optimizer,
    clip_gradients,
    ema_update,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    update_ema,
)


class Small(nn.Module):
    """A matrix, a bias, a gain like that of a response norm, and running statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 4)
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x) * self.gamma.view(4))


def test_the_published_rate_is_zero_once_and_then_constant() -> None:
    settings = OptimSettings()
    assert [learning_rate(step, settings) for step in (0, 1, 2, 10**6)] == [0.0, 1e-4, 1e-4, 1e-4]


def test_warm_up_is_a_line_from_zero() -> None:
    settings = OptimSettings(lr=0.4, warmup=4)
    assert [learning_rate(step, settings) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert learning_rate(0, OptimSettings(lr=0.4, warmup=0)) == 0.4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1.0, 1.0, 0.775, 0.55, 0.1, 0.1]), ("cosine", [1.0, 1.0, 0.8682, 0.55, 0.1, 0.1])],
)
def test_falling_rates_end_at_their_fraction(schedule: str, expected: list[float]) -> None:
    settings = OptimSettings(lr=1.0, schedule=schedule, fall_from=100, fall_until=500, final=0.1)
    got = [learning_rate(step, settings) for step in (1, 100, 200, 300, 500, 900)]
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"schedule": "cosine"}, "needs fall_until"),
        ({"schedule": "linear", "fall_from": 10, "fall_until": 10}, "must come after fall_from"),
        ({"schedule": "linear", "warmup": 50, "fall_until": 10}, r"after warm-up \(50\)"),
        ({"lr": 0.0}, "greater than 0"),
        ({"lr": float("nan")}, "finite"),
        ({"learning_rate": 1e-4}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        OptimSettings.model_validate(settings)


def test_everything_decays_as_published_unless_only_matrices_shall() -> None:
    model = Small()
    (group,) = parameter_groups(model.parameters(), OptimSettings())
    assert group["weight_decay"] == 0.01
    assert len(group["params"]) == 5  # type: ignore[arg-type]
    matrices, vectors = parameter_groups(model.parameters(), OptimSettings(decay_only_matrices=True))
    assert [p is model.linear.weight for p in matrices["params"]] == [True]  # type: ignore[attr-defined]
    assert len(vectors["params"]) == 4  # type: ignore[arg-type]
    assert vectors["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    model = Small()
    model.linear.requires_grad_(False)
    assert len(build_optimizer(model.parameters(), OptimSettings()).param_groups[0]["params"]) == 3
    with pytest.raises(TrainingError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False).parameters(), OptimSettings())


def test_an_update_is_that_of_the_librarys_plain_adamw() -> None:
    ours, theirs = Small().eval(), Small().eval()  # batch statistics would leave rounding as a gradient
    optimizer = build_optimizer(ours.parameters(), OptimSettings(lr=0.01))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, foreach=False, fused=False)
    for seed in range(5):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        for model, opt in ((ours, optimizer), (theirs, plain)):
            opt.zero_grad()
            model(x).pow(3).mean().backward()
            opt.step()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_rate_is_set_in_every_group_and_rate_zero_changes_nothing() -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model.parameters(), OptimSettings(decay_only_matrices=True))
    set_learning_rate(optimizer, 0.0)
    model.eval()(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_resumed_optimiser_continues_bit_for_bit() -> None:
    def steps(model: Small, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).pow(3).mean().backward()
            optimizer.step()

    settings = OptimSettings(lr=0.01)
    unbroken = Small()
    optimizer = build_optimizer(unbroken.parameters(), settings)
    steps(unbroken, optimizer, range(3))
    resumed = Small(seed=1)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    again = build_optimizer(resumed.parameters(), settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(unbroken, optimizer, range(3, 6))
    steps(resumed, again, range(3, 6))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_clipping_returns_the_norm_before() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model.parameters(), 0.0).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_gradients(model.parameters(), 1.0).item() == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=0)


def test_the_average_goes_by_name_and_includes_buffers() -> None:
    ema, model = Small(0), Small(1)
    model(torch.randn(8, 3))  # moves the running statistics
    before, values = copy.deepcopy(ema.state_dict()), model.state_dict()
    ema_update(ema, model, 0.9)
    for name, got in ema.state_dict().items():
        if got.is_floating_point():
            torch.testing.assert_close(got, 0.9 * before[name] + 0.1 * values[name])
        else:
            assert torch.equal(got, values[name])


def test_the_average_can_be_wider_than_the_network() -> None:
    ema, model = Small(0), Small(1).to(torch.bfloat16)
    ema_update(ema, model, 0.5)
    assert ema.gamma.dtype == torch.float32


def test_networks_that_are_not_alike_are_refused() -> None:
    with pytest.raises(TrainingError, match="in one of them only: bias"):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)


def test_the_average_is_a_copy_until_it_starts() -> None:
    settings = EmaSettings(every=2, beta=0.9, start=2)
    ema, model = Small(0), Small(1)
    first = copy.deepcopy(ema.state_dict())
    assert not update_ema(ema, model, 1, settings)
    assert torch.equal(ema.gamma, first["gamma"])
    assert update_ema(ema, model, 2, settings)
    assert torch.equal(ema.gamma, model.gamma)
    with torch.no_grad():
        model.gamma.add_(1.0)
    assert not update_ema(ema, model, 3, settings)
    assert update_ema(ema, model, 4, settings)
    torch.testing.assert_close(ema.gamma, model.gamma - 0.9)
