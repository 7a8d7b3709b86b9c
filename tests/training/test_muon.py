"""Muon: orthogonal updates as large as AdamW's, AdamW for the rest, an exact state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from triptych.training.muon import Muon, is_matrix, leave_to_adamw, orthogonalize
from triptych.training.optim import OptimSettings, build_optimizer


def network(seed: int = 0) -> nn.Sequential:
    """Matrices of two shapes, a 1x1 and a depthwise convolution, vectors."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Flatten(), nn.Linear(256, 32),
        nn.Linear(32, 32), nn.Linear(32, 4),
    )  # fmt: skip


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(3, 32, 2, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(3, 40, 80), (2, 32, 96), (2, 96, 32)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    got = orthogonalize(x)
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    along = u.mT @ got @ vh.mT  # diagonal, where the singular vectors are those of x
    assert (along - torch.diag_embed(along.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_a_narrow_iteration_goes_the_same_way() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 48, 96)
    narrow, wide = (orthogonalize(x, narrow=narrow).float().flatten(1) for narrow in (True, False))
    assert torch.cosine_similarity(narrow, wide).min() > 0.99


def test_a_matrix_of_zeros_stays_one() -> None:
    assert orthogonalize(torch.zeros(1, 32, 32)).eq(0).all()


def test_matrices_in_a_batch_do_not_see_each_other() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 32, 48)
    torch.testing.assert_close(orthogonalize(x)[1:2], orthogonalize(x[1:2]))


def test_the_direction_is_that_of_torchs_own_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(2)
    ours, theirs = (nn.Parameter(torch.zeros(64, 32)) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours]}], lr=0.1, weight_decay=0.0),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    gradient = torch.randn(64, 32)
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.cosine_similarity(ours.detach().flatten(), theirs.detach().flatten(), dim=0) > 0.999
    torch.testing.assert_close(ours.detach().norm(), theirs.detach().norm(), rtol=0.02, atol=0)


def test_an_update_is_as_large_as_adamws() -> None:
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.zeros(128, 512))
    parameter.grad = torch.randn_like(parameter)
    Muon([{"params": [parameter]}], lr=1.0, weight_decay=0.0).step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


def test_what_is_no_dense_matrix_moves_by_adamw_exactly() -> None:
    model, other = network(), network()
    assert [name for name, p in model.named_parameters() if is_matrix(p)] == [
        "0.weight", "3.weight", "4.weight",
    ]  # fmt: skip
    settings = OptimSettings(kind="muon", lr=1e-2)
    take_steps(model, build_optimizer(model.parameters(), settings), 0, 1)
    take_steps(other, build_optimizer(other.parameters(), OptimSettings(lr=1e-2)), 0, 1)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.equal(q) is not is_matrix(p), name


def test_a_restored_state_goes_on_exactly() -> None:
    model = network()
    settings = OptimSettings(kind="muon", lr=1e-2, decay_only_matrices=True)
    optimizer = build_optimizer(model.parameters(), settings)
    take_steps(model, optimizer, 0, 3)
    again = copy.deepcopy(model)
    resumed = build_optimizer(again.parameters(), settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, 3, 6)
    take_steps(again, resumed, 3, 6)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.equal(q)


def test_a_module_left_to_adamw_moves_as_under_adamw() -> None:
    left, other = network(), network()
    leave_to_adamw(left)
    settings = OptimSettings(kind="muon", lr=1e-3)
    take_steps(left, build_optimizer(left.parameters(), settings), 0, 3)
    take_steps(
        other, build_optimizer(other.parameters(), settings.model_copy(update={"kind": "adamw"})), 0, 3
    )
    for ours, theirs in zip(left.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
