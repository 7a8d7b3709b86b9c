"""Every kind of optimiser learns, resumes exactly and, where there is one, agrees with its reference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from triptych.checkpoints.files import read_tensors, write_tensors
from triptych.training.adamw8bit import CHUNK, AdamW8bit, code_book, quantize
from triptych.training.moments import moments_of, restore_moments
from triptych.training.optim import OptimSettings, build_optimizer, to_training_point

KINDS = ["adamw", "muon", "adafactor", "adamw8bit", "schedule_free"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 128), nn.Tanh(), nn.Linear(128, 40))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Learn to give the input back."""
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        x = torch.randn(64, 40)
        to_training_point(optimizer, True)
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        to_training_point(optimizer, False)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_at_the_same_rate(kind: str) -> None:
    model = network()
    losses = take_steps(model, build_optimizer(model.parameters(), OptimSettings(kind=kind, lr=3e-3)), 0, 60)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_to_a_file_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = network()
    settings = OptimSettings(kind=kind, lr=3e-3)
    optimizer = build_optimizer(model.parameters(), settings)
    take_steps(model, optimizer, 0, 3)
    write_tensors(tmp_path / "moments.safetensors", moments_of(optimizer))
    again = copy.deepcopy(model)
    resumed = build_optimizer(again.parameters(), settings)
    restore_moments(resumed, read_tensors(tmp_path / "moments.safetensors"))
    take_steps(model, optimizer, 3, 6)
    take_steps(again, resumed, 3, 6)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.equal(q)


def test_a_factored_optimiser_remembers_little_and_an_8_bit_one_a_quarter() -> None:
    sizes = {}
    for kind in ("adamw", "adafactor", "adamw8bit"):
        model = nn.Linear(256, 256, bias=False)
        optimizer = build_optimizer(model.parameters(), OptimSettings(kind=kind))
        model(torch.randn(2, 256)).sum().backward()
        optimizer.step()
        sizes[kind] = sum(t.numel() * t.element_size() for t in moments_of(optimizer).values())
    assert sizes["adafactor"] < 0.01 * sizes["adamw"]
    assert sizes["adamw8bit"] == pytest.approx(sizes["adamw"] / 4, rel=0.02)


def test_8_bit_averages_hardly_change_the_path_of_adamw() -> None:
    models, paths = [network(), network()], []
    for model, kind in zip(models, ("adamw", "adamw8bit"), strict=True):
        start = copy.deepcopy(model)
        take_steps(model, build_optimizer(model.parameters(), OptimSettings(kind=kind, lr=1e-3)), 0, 20)
        paths.append(model[0].weight.detach() - start[0].weight.detach())
    assert (paths[0] - paths[1]).norm() < 0.1 * paths[0].norm()


def test_small_parameters_move_by_adamw_to_rounding() -> None:
    ours, theirs = nn.Parameter(torch.ones(7, 9)), nn.Parameter(torch.ones(7, 9))
    optimizers = [AdamW8bit([{"params": [ours]}], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)]
    for step in range(5):
        torch.manual_seed(step)
        ours.grad = torch.randn(7, 9)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_parameter_is_updated_alike_in_pieces_and_in_any_layout() -> None:
    torch.manual_seed(0)
    assert CHUNK % 256 == 0
    plain = nn.Parameter(torch.randn(100, 50, 2, 2))
    striped = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    gradient = torch.randn(100, 50, 2, 2)
    for p in (plain, striped):
        p.grad = gradient.clone()
        AdamW8bit([{"params": [p]}], lr=0.1).step()
    assert striped.is_contiguous(memory_format=torch.channels_last)
    assert plain.equal(striped)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_256_and_keep_seven_decades(signed: bool) -> None:
    book = code_book(signed)
    assert len(book) == 256
    assert book.unique().equal(book)
    magnitudes = 10 ** torch.linspace(-6, 0, 256)
    codes, scale = quantize(magnitudes[None], signed)
    back = book[codes.int()] * scale[:, None]
    assert ((back[0] - magnitudes) / magnitudes).abs().max() < 0.7  # one code is left for the smallest decade
    largest = magnitudes > 0.1
    assert ((back[0] - magnitudes) / magnitudes).abs()[largest].max() < (0.06 if signed else 0.03)
    assert quantize(torch.zeros(1, 256), signed)[1].eq(0).all()


def test_a_falling_rate_is_refused_where_weights_are_averaged_instead() -> None:
    with pytest.raises(ValidationError, match="averages weights instead of lowering the rate"):
        OptimSettings(kind="schedule_free", schedule="linear", fall_until=10)
