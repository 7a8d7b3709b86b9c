"""A small BERT encoder [Devlin 2018], in the size of all-MiniLM-L6-v2 [Wang 2020, Reimers 2019].

It is the text tower of the small cascade: 6 layers of width 384, post-norm. The published weights load
through `from_bert`, which joins query, key and value into one matrix and folds the (always equal) token
type row into the positions, so that the network has nothing it does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MiniLMConfig:
    vocabulary: int = 30522  # WordPiece tokens, lower case
    positions: int = 512  # longest sequence the network can read
    width: int = 384  # of the hidden states and of the pooled vector
    layers: int = 6
    heads: int = 12
    hidden: int = 1536  # inner width of the feed-forward part
    norm_eps: float = 1e-12


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by the norm of its sum with the input (post-norm)."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_in = nn.Linear(config.width, config.hidden)
        self.feed_out = nn.Linear(config.hidden, config.width)
        self.feed_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(
            batch, length, 3, self.heads, width // self.heads
        )  # (B, n, 3, heads, head width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, n, head width)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = self.attention_norm(x + self.attention_out(mixed))
        return self.feed_norm(x + self.feed_out(F.gelu(self.feed_in(x))))


class MiniLM(nn.Module):
    """Token ids to hidden states and one vector for the whole text."""

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.config = config
        # Tables made this way skip nn.Embedding's own normal draw, which on the meta device imports torch's
        # whole compiler (seconds).
        tokens, positions = (
            torch.empty(rows, config.width) for rows in (config.vocabulary, config.positions)
        )
        self.tokens = nn.Embedding.from_pretrained(tokens, freeze=False)
        self.positions = nn.Embedding.from_pretrained(positions, freeze=False)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: truncated normal with deviation 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def width(self) -> int:
        """Width of the hidden states and of the pooled vector."""
        return self.config.width

    def token_table(self) -> tuple[nn.Module, str]:
        """The module that holds the token vectors, and its name there, for learned tokens."""
        return self, "tokens"

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, n, width) of `ids` (B, n); `mask` (B, n) is True at real tokens.

        States at padding positions are computed but mean nothing; no real token looks at them.
        """
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]  # (B, n, width)
        x = self.norm(x)
        keys = mask.bool()[:, None, None, :]  # (B, 1, 1, n)
        for layer in self.layers:
            x = layer(x, keys)
        return x

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`text_hidden` (B, n, width), zero at padding, and `text_pooled` (B, width) of length 1.

        `ids` and `mask` are (B, n), padding at the end. Columns of nothing but padding are not computed.
        """
        real = mask.bool()
        longest = max(1, int(real.sum(1).max()))
        hidden = self.states(ids[:, :longest], real[:, :longest])
        hidden = hidden * real[:, :longest, None].to(hidden.dtype)
        pooled = mean_pool(hidden, real[:, :longest])
        return F.pad(hidden, (0, 0, 0, ids.shape[1] - longest)), pooled


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sentence vector (B, width) [Reimers 2019]: mean of (B, n, width) over real tokens, length 1."""
    weights = mask.to(hidden.dtype)[:, :, None]
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return F.normalize(mean, dim=-1)


def from_bert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published BERT file under our names; its unused parts are dropped.

    Raises KeyError naming the first missing tensor when the file is not a BERT encoder.
    """
    types = tensors["embeddings.token_type_embeddings.weight"]
    ours = {
        "tokens.weight": tensors["embeddings.word_embeddings.weight"],
        "positions.weight": tensors["embeddings.position_embeddings.weight"] + types[0],
        "norm.weight": tensors["embeddings.LayerNorm.weight"],
        "norm.bias": tensors["embeddings.LayerNorm.bias"],
    }
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")}
    renamed = {
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feed_in": "intermediate.dense",
        "feed_out": "output.dense",
        "feed_norm": "output.LayerNorm",
    }
    for layer in sorted(layers):
        for kind in ("weight", "bias"):
            theirs = f"encoder.layer.{layer}."
            parts = [tensors[f"{theirs}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
            for new, old in renamed.items():
                ours[f"layers.{layer}.{new}.{kind}"] = tensors[f"{theirs}{old}.{kind}"]
    return ours


MINILM = {
    "l6": MiniLMConfig(),
    "tiny": MiniLMConfig(vocabulary=200, positions=64, width=32, layers=2, heads=4, hidden=64),
}
