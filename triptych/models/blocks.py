"""The blocks that Stages B and C are built from.

Feature maps are (B, C, H, W) tensors in channels-last memory, so that the norms and linear layers, which
work on channels, and the depthwise convolutions, which work on space, share one layout without copies.

For sampling, blocks take a `Scratch`. While its `fused` is set, they may overwrite the map they are given;
while its `compiled` is, they run under torch.compile, but those that work in spans on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.models.compiled import run_compiled
from triptych.models.fused import add_perceptron, is_plain
from triptych.models.response import Response
from triptych.models.scratch import Buffer, Scratch, keep, spread

NORM_EPS = 1e-6
SMALL_MAP = 2**17  # scores of a head: 256 KiB of bfloat16


def channels_last(x: Tensor) -> Tensor:
    """View (B, C, H, W) as (B, H, W, C); free of copies in channels-last memory."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with aligned corners, computed in float32, returned in the dtype of `x`."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=True).to(x.dtype)


def embed_time(t: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding of t (B,) in [0, 1] -> (B, size), float32.

    The angles reach 10000, which bfloat16 cannot hold to a useful precision, so everything here is float32.
    """
    half = size // 2
    rates = torch.exp(torch.arange(half, device=t.device).float() * (-math.log(10000) / (half - 1)))
    angles = (t.float() * 10000)[:, None] * rates[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, size - 2 * half))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W) at every position, without learned scale or shift."""

    norm_eps = NORM_EPS

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(norm_last(channels_last(x), self.norm_eps))


def norm_last(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Layer norm over the last axis, no affine part.

    Blocks hold their eps in `norm_eps`: where the stream is carried smaller by a factor s, to fit float16,
    it is smaller by s * s, which keeps the result the same.
    """
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class GlobalResponseNorm(nn.Module):
    """Divides each channel's energy over the picture by the mean of all channels [ConvNeXt V2, eq. 1-3]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        if torch.is_grad_enabled():
            return Response.apply(x, self.gamma, self.beta, NORM_EPS)  # type: ignore[no-any-return]
        # The sum over a large map leaves float16's range, hence float32.
        energy = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32)
        return torch.addcmul(self.beta, x, self.scale(energy, x.dtype)[:, None, None])

    def scale(self, energy: Tensor, dtype: torch.dtype) -> Tensor:
        """What channels are multiplied by, from their norms over the picture (B, C), float32."""
        response = (energy / (energy.mean(dim=-1, keepdim=True) + NORM_EPS)).to(dtype)
        return 1 + self.gamma.flatten() * response


class ConvBlock(nn.Module):
    """Depthwise convolution, then a two-layer perceptron over channels; the official `ResBlock` ("C")."""

    norm_eps = NORM_EPS

    def __init__(self, width: int, skip_width: int = 0, kernel: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.channelwise = perceptron(width + skip_width, width, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
        if scratch is not None and is_bare(self.channelwise, x):
            if scratch.in_spans(x):
                return overwrite(x, self.channelwise, self.depthwise(x), skip, self.norm_eps, scratch)
            if scratch.compiled:
                return run_compiled(ConvBlock.plain, self, x, skip)
        return self.plain(x, skip)

    def plain(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The formula itself."""
        h = norm_last(channels_last(self.depthwise(x)), self.norm_eps)  # (B, H, W, C)
        if skip is not None:
            h = torch.cat([h, channels_last(skip)], dim=-1)  # the skip joins after the norm, as it is
        return x + channels_first(self.channelwise(h))


class FeedForwardBlock(nn.Module):
    """The perceptron of a ConvBlock without the convolution; the official `FeedForwardBlock` ("F")."""

    norm_eps = NORM_EPS

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.channelwise = perceptron(width, width, dropout)

    def forward(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        if scratch is not None and is_bare(self.channelwise, x):
            if scratch.in_spans(x):
                return overwrite(x, self.channelwise, x, None, self.norm_eps, scratch)
            if scratch.compiled:
                return run_compiled(FeedForwardBlock.plain, self, x)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """The formula itself."""
        return x + channels_first(self.channelwise(norm_last(channels_last(x), self.norm_eps)))


def perceptron(width_in: int, width: int, dropout: float) -> nn.Sequential:
    """The channel mixing of C and F blocks, on (B, H, W, C)."""
    return nn.Sequential(
        nn.Linear(width_in, 4 * width),
        nn.GELU(),
        GlobalResponseNorm(4 * width),
        nn.Dropout(dropout),
        nn.Linear(4 * width, width),
    )


def is_bare(layers: Any, x: Tensor) -> bool:
    """Is this perceptron nothing but its formula: may a block with it work in place, or be compiled?"""
    dropout = layers.training and layers[3].p > 0
    return not dropout and is_plain(layers[0], x) and is_plain(layers[4], x)


def overwrite(
    x: Tensor, layers: Any, source: Tensor, skip: Tensor | None, eps: float, scratch: Scratch
) -> Tensor:
    """x + layers(norm(source) and skip side by side), in the memory of x if it is channels-last."""
    onto = as_rows(x)
    add_perceptron(
        layers, as_rows(source), None if skip is None else as_rows(skip), onto, eps, scratch.buffer
    )
    return channels_first(onto.unflatten(1, x.shape[-2:]))


def as_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), contiguous; a view of channels-last memory."""
    return channels_last(x).contiguous().flatten(1, 2)


class TimeBlock(nn.Module):
    """Scales and shifts channels by the time; the official `TimestepBlock` ("T").

    `extra_times` names further scalar conditions with a linear each; the time vector holds one chunk for the
    time and one for each of them, and their scales and shifts add up. With `pooled_width` above 0, a last
    chunk of that length, the pooled text, does the same (no published network has it).
    """

    def __init__(
        self, width: int, time_size: int, extra_times: Sequence[str] = (), pooled_width: int = 0
    ) -> None:
        super().__init__()
        sizes = {"mapper": time_size, **{f"mapper_{name}": time_size for name in extra_times}}
        if pooled_width:
            sizes["mapper_pooled"] = pooled_width
        self.names, self.sizes = list(sizes), list(sizes.values())
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(size, 2 * width))

    def forward(self, x: Tensor, time_vector: Tensor, scratch: Scratch | None = None) -> Tensor:
        """time_vector (B, sum of sizes), or (steps, 1 or B, ...) for all steps, whose scales and shifts are
        then worked out together; the scratch knows which step it is."""
        if time_vector.ndim == 2:
            scale_shift = self.scales_and_shifts(time_vector)
        else:
            assert scratch is not None
            assert scratch.row is not None
            of_all = scratch.keep(self, time_vector.shape[1], lambda: self.scales_and_shifts(time_vector))
            scale_shift = of_all[scratch.row]
        x = spread(x, len(scale_shift))
        if len(scale_shift) > 1:
            scale_shift = spread(scale_shift, len(x))
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        if scratch is not None and scratch.fused:
            return torch.addcmul(shift, x, 1 + scale, out=x)
        return torch.addcmul(shift, x, 1 + scale)

    def scales_and_shifts(self, vectors: Tensor) -> Tensor:
        """Time vectors (..., sum of sizes) -> scales and shifts side by side (..., 2 * width)."""
        chunks = vectors.split(self.sizes, dim=-1)
        parts = [self.get_submodule(name)(chunk) for name, chunk in zip(self.names, chunks, strict=True)]
        total: Tensor = sum(parts[1:], parts[0])
        return total


class PackedAttention(nn.Module):
    """Multi-head attention whose query, key and value matrices are one plain linear layer.

    Official files call its weight `in_proj_weight`; a linear layer lets adapters of every kind sit on it.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, self_attention: bool) -> Tensor:
        """x (B, n, C) attends to itself, if asked, and to the projected context (B or more, m, 2C)."""
        return self.out_proj(self.attend(x, context, self_attention))

    def attend(self, x: Tensor, context: Tensor, self_attention: bool) -> Tensor:
        """What heads bring together, before the last linear layer."""
        query, key, value = spread(self.in_proj(x), len(context)).chunk(3, dim=-1)
        context_key, context_value = context.chunk(2, dim=-1)
        if self_attention:
            key = torch.cat([key, context_key], dim=1)
            value = torch.cat([value, context_value], dim=1)
        else:
            key, value = context_key, context_value
        heads = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        mixed = mix_values(*heads, self.dropout if self.training else 0.0)
        return mixed.transpose(1, 2).flatten(2)

    def attend_in(self, buffer: Buffer, x: Tensor, context: Tensor) -> Tensor:
        """As `attend` with self-attention, where keys and values are made side by side with the context's
        rather than copied there. in_proj is plain."""
        batch, count, width = x.shape
        rows = count + context.shape[1]
        packed = buffer.take(batch * rows, 3 * width, x).view(batch, rows, 3 * width)
        for own, sample in zip(packed, x, strict=True):
            torch.addmm(self.in_proj.bias, sample, self.in_proj.weight.t(), out=own[:count])
        packed[:, count:, width:] = context
        query, key, value = packed.chunk(3, dim=-1)
        heads = self.split_heads(query[:, :count]), self.split_heads(key), self.split_heads(value)
        return mix_values(*heads, dropout=0.0).transpose(1, 2).flatten(2)

    def is_bare(self, x: Tensor) -> bool:
        """Is it nothing but its formula?"""
        return not self.training and is_plain(self.in_proj, x) and is_plain(self.out_proj, x)

    def project_context(self, context: Tensor) -> Tensor:
        """Keys and values of the context (B, m, 2C); its queries are never needed, so they are not computed
        unless something (an adapter, a quantised layer) has taken the place of the plain linear layer."""
        width = context.shape[-1]
        if type(self.in_proj) is nn.Linear and not self.in_proj._forward_hooks:
            bias = self.in_proj.bias
            return F.linear(context, self.in_proj.weight[width:], bias[width:])
        return self.in_proj(context)[..., width:]

    def split_heads(self, x: Tensor) -> Tensor:  # (B, n, C) -> (B, heads, n, C / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def mix_values(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, heads, n or m, d).

    torch's kernel for CPUs takes three times as long as the products themselves to give gradients of small
    maps in bfloat16; there the formula is used as it stands.
    """
    small = query.shape[2] * key.shape[2] <= SMALL_MAP
    narrow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not (narrow and small and torch.is_grad_enabled()) or dropout:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Attention(nn.Module):
    """Holds the packed attention one level down, where the official files have it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = PackedAttention(width, heads, dropout)


class AttentionBlock(nn.Module):
    """Positions attend to each other and to the condition tokens; the official `AttnBlock` ("A")."""

    norm_eps = NORM_EPS

    def __init__(
        self, width: int, cond_width: int, heads: int, self_attention: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.attention = Attention(width, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, width))

    def forward(self, x: Tensor, tokens: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Keys and values of tokens are made once per scratch. More tokens than maps: see `spread`."""
        attn = self.attention.attn
        context = keep(scratch, self, len(tokens), lambda: attn.project_context(self.kv_mapper(tokens)))
        if scratch is not None and scratch.compiled and attn.is_bare(x):
            return run_compiled(AttentionBlock.plain, self, x, context)
        if scratch is not None and scratch.fused and is_plain(attn.out_proj, x):
            h = norm_last(channels_last(x), self.norm_eps).flatten(1, 2)  # (B, H * W, C)
            x = spread(x, len(tokens))
            onto = as_rows(x)
            if self.self_attention and len(h) == len(context) and is_plain(attn.in_proj, h):
                mixed = attn.attend_in(scratch.buffer, h, context)
            else:
                mixed = attn.attend(h, context, self.self_attention)
            onto.add_(attn.out_proj(mixed))
            return channels_first(onto.unflatten(1, x.shape[-2:]))
        return self.plain(x, context)

    def plain(self, x: Tensor, context: Tensor) -> Tensor:
        """The formula itself, with the keys and values of tokens."""
        h = norm_last(channels_last(x), self.norm_eps).flatten(1, 2)  # (B, H * W, C)
        mixed = self.attention.attn(h, context, self.self_attention)
        return spread(x, len(context)) + channels_first(mixed.unflatten(1, x.shape[-2:]))
