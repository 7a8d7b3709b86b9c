"""Our BERT equals the published one, ignores padding, and what we ship still knows English."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import triptych
from triptych.checkpoints.headers import read_metadata
from triptych.checkpoints.int8 import narrow, widen
from triptych.conditioning.encode import TextEncoder, load_text_encoder
from triptych.models.minilm import MINILM, MiniLM, MiniLMConfig, from_bert, mean_pool

SHIPPED = Path(triptych.__file__).parent / "weights" / "mini" / "text_encoder.safetensors"
TINY = MINILM["tiny"]


@pytest.fixture(scope="module")
def shipped() -> TextEncoder:
    return load_text_encoder(SHIPPED)


def windows(lengths: list[int], size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(size)[None] < torch.tensor(lengths)[:, None]
    return torch.randint(5, TINY.vocabulary, (len(lengths), size)) * mask, mask


def test_equals_the_transformers_library() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=TINY.vocabulary,
        hidden_size=TINY.width,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        intermediate_size=TINY.hidden,
        max_position_embeddings=TINY.positions,
        layer_norm_eps=TINY.norm_eps,
    )
    theirs = BertModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    ours = MiniLM(TINY).eval()
    ours.load_state_dict(from_bert(theirs.state_dict()), strict=True)
    ids, mask = windows([12, 1, 7])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        hidden, pooled = ours(ids, mask)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, mean_pool(expected, mask), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_is_zero_and_changes_nothing() -> None:
    network = MiniLM(TINY).eval()
    ids, mask = windows([12, 4])
    hidden, pooled = network(ids, mask)
    assert hidden.shape == (2, 12, TINY.width)
    assert not hidden[1, 4:].any()
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))
    alone, alone_pooled = network(ids[1:], mask[1:])
    torch.testing.assert_close(alone[0], hidden[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(alone_pooled[0], pooled[1], rtol=0, atol=1e-6)


def test_int8_rows_are_near_and_small() -> None:
    state = MiniLM(TINY).state_dict()
    stored = narrow(state)
    back = widen(stored)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        step = tensor.flatten(1).abs().amax(1) / 127 if tensor.ndim > 1 else torch.zeros(len(tensor))
        bound = (step * 0.501).reshape(-1, *[1] * (tensor.ndim - 1))
        assert ((back[name] - tensor).abs() <= bound).all()
    assert narrow({"zero": torch.zeros(2, 3)})["zero"].dtype == torch.int8
    assert not widen(narrow({"zero": torch.zeros(2, 3)}))["zero"].any()


def test_shipped_file_says_what_it_is(shipped: TextEncoder) -> None:
    info = read_metadata(SHIPPED)
    assert (info.part, info.licence) == ("text_encoder", "Apache-2.0")
    assert "all-MiniLM-L6-v2" in info.notice
    assert MiniLMConfig(**info.config) == MINILM["l6"]
    assert SHIPPED.stat().st_size < 24e6
    assert (shipped.width, shipped.window) == (384, 32)


def test_shipped_file_knows_what_resembles_what(shipped: TextEncoder) -> None:
    _, pooled = shipped.encode(["a red apple", "an apple", "a blue fire truck"])
    apple, truck = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert apple == pytest.approx(0.82, abs=0.02)
    assert truck == pytest.approx(0.21, abs=0.03)
