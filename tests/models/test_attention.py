"""Attention of small maps in bfloat16, whose gradients torch's kernel gives slowly, is the same attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from triptych.models import blocks


@pytest.mark.parametrize("most", [0, 2**17])  # torch's kernel, the formula as it stands
def test_narrow_attention_and_its_gradients_are_near_those_of_float32(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SMALL_MAP", most)
    torch.manual_seed(0)
    heads = [torch.randn(2, 3, rows, 8) for rows in (16, 21, 21)]
    weights = torch.randn(2, 3, 16, 8)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [head.to(dtype).requires_grad_() for head in heads]
        mixed = blocks.mix_values(*given, dropout=0.0)
        assert mixed.dtype == dtype
        (mixed.float() * weights).sum().backward()
        found.append([mixed, *(head.grad for head in given)])
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.05)


def test_float32_takes_torchs_kernel() -> None:
    heads = [torch.randn(1, 2, rows, 8, requires_grad=True) for rows in (4, 6, 6)]
    assert torch.equal(blocks.mix_values(*heads, dropout=0.0), F.scaled_dot_product_attention(*heads))
