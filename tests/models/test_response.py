"""The response norm's own backward pass gives the gradients of the formula."""

from __future__ import annotations

import pytest
import torch

from triptych.models import response
from triptych.models.blocks import NORM_EPS, GlobalResponseNorm


def formula(norm: GlobalResponseNorm, x: torch.Tensor) -> torch.Tensor:
    energy = torch.linalg.vector_norm(x, dim=(1, 2))
    share = energy / (energy.mean(-1, keepdim=True) + NORM_EPS)
    return x * (1 + norm.gamma * share[:, None, None]) + norm.beta


@pytest.mark.parametrize("span", [8, 2**17])
def test_gradients_are_those_of_the_formula(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response, "SPAN", span)
    norm = GlobalResponseNorm(6)
    torch.nn.init.normal_(norm.gamma)
    x = torch.randn(3, 4, 5, 6)
    x[1, ..., 2] = 0  # a channel without energy
    weights = torch.randn_like(x)
    found = []
    for call in (norm, lambda x: formula(norm, x)):
        given = x.clone().requires_grad_(True)
        norm.zero_grad()
        y = call(given)
        (y * weights).sum().backward()
        found.append([y.detach(), given.grad, norm.gamma.grad, norm.beta.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_keeps_the_precision_of_a_narrow_map() -> None:
    norm = GlobalResponseNorm(8)
    torch.nn.init.normal_(norm.gamma)
    x = torch.randn(2, 3, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    norm(x).float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    wide = x.detach().float().requires_grad_(True)
    formula(norm, wide).square().sum().backward()
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0.05, atol=0.1)
