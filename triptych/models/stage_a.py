"""Stage A, a VQGAN with factor 4: pixels <-> `latents_b`, and the discriminator it is trained against.

The published cascade never quantises: Stage B learns, and Stage A decodes, the continuous encoder output
divided by `StageAConfig.scale`. The codebook serves only Stage A's own training (VQGAN, Esser 2021; the
network itself is Paella's, Rampas 2022). Parameter names are the official ones; `gammas` are the six scalars
of a mixing block.

The autoencoder runs in the channels-last memory format, where layer norms and linears over channels need no
copies; the discriminator does not, because instance norms are faster without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.models.fused import is_plain, spans
from triptych.models.scratch import Buffer, span_rows


@dataclass(frozen=True)
class StageAConfig:
    levels: int = 2  # each level halves the picture; the first one is a pixel unshuffle
    width: int = 384  # channels of the innermost level; every level outwards has half of it
    bottleneck_blocks: int = 12  # mixing blocks of the decoder at the innermost level
    latent_channels: int = 4
    codes: int = 8192  # codebook entries, used only in training
    scale: float = 0.43  # latents_b = encoder output / scale

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level, outermost first."""
        return tuple(self.width // 2 ** (self.levels - 1 - level) for level in range(self.levels))


@dataclass(frozen=True)
class DiscriminatorConfig:
    in_channels: int = 3
    cond_width: int = 0  # length of an optional condition vector
    width: int = 512
    depth: int = 6  # stride-2 convolutions, at least 4

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each convolution."""
        halvings = max(self.depth - 3, 3)
        return tuple(self.width // 2 ** max(halvings - i, 0) for i in range(self.depth))


class Quantised(NamedTuple):
    """What Stage A's own training needs from one batch; both latents are divided by the scale."""

    codes: Tensor  # (B,4,h,w) nearest codebook entries, gradient straight through to the encoder
    latents: Tensor  # (B,4,h,w) the continuous latents
    indices: Tensor  # (B,h,w) int64
    loss: Tensor  # () codebook loss + 0.25 commitment loss


class MixingBlock(nn.Module):
    """Depthwise 3x3, an MLP per pixel, both residual; six scalars, zero at birth, make it the identity."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(width, width, 3, groups=width))
        self.channelwise = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.gammas = nn.Parameter(torch.zeros(6))

    def reset_parameters(self) -> None:
        for layer in (*self.depthwise, *self.channelwise):
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.gammas)

    def _norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        # One scale and shift for all channels; handing them to layer_norm saves two passes over the picture.
        affine = ((1 + scale).expand(self.width), shift.expand(self.width))
        return F.layer_norm(x.permute(0, 2, 3, 1), (self.width,), *affine, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        g = self.gammas
        mixed = self.depthwise(self._norm(x, g[0], g[1]).permute(0, 3, 1, 2))  # (B,c,h,w)
        x = torch.addcmul(x, mixed, g[2])
        h = self.channelwise(self._norm(x, g[3], g[4]))  # (B,h,w,c)
        return torch.addcmul(x, h.permute(0, 3, 1, 2), g[5])

    def overwrite(self, x: Tensor, buffer: Buffer) -> Tensor:
        """As `forward`, in the memory of x if it is channels-last, without a second map of its size."""
        x = x.contiguous(memory_format=torch.channels_last)
        if not is_plain(self.channelwise[0], x) or not is_plain(self.channelwise[2], x):
            return self(x)
        for sample in x.split(1):
            self._add_depthwise(sample)
            self._add_channelwise(sample.permute(0, 2, 3, 1).view(-1, self.width), buffer)
        return x

    def _add_depthwise(self, x: Tensor) -> None:
        """In bands of rows; each needs the row above as it was before."""
        g, height = self.gammas, x.shape[2]
        above = None
        for rows in spans(height, span_rows(self.width * x.shape[3], x)):
            below = min(rows.stop + 1, height)
            band = self._norm(x[:, :, rows.start : below], g[0], g[1])  # (1,h,w,c)
            edges = [band[:, :1] if above is None else above, band]
            if rows.stop == height:
                edges.append(band[:, -1:])
            above = band[:, rows.stop - rows.start - 1 :][:, :1].clone()
            framed = torch.cat(edges, dim=1).permute(0, 3, 1, 2)
            mixed = self.depthwise[1](F.pad(framed, (1, 1, 0, 0), mode="replicate"))
            x[:, :, rows].addcmul_(mixed, g[2])

    def _add_channelwise(self, x: Tensor, buffer: Buffer) -> None:
        """x (h * w, c), in spans of rows."""
        g, layers = self.gammas, self.channelwise
        first: Any = layers[0]
        last: Any = layers[2]
        scale, shift = (1 + g[3]).expand(self.width), g[4].expand(self.width)
        step = span_rows(first.out_features, x)
        hidden = buffer.take(min(step, len(x)), first.out_features, x)
        for rows in spans(len(x), step):
            entered = F.layer_norm(x[rows], (self.width,), scale, shift, eps=1e-6)
            wide = hidden[: len(entered)]
            torch.addmm(first.bias, entered, first.weight.t(), out=wide)
            torch.ops.aten.gelu_(wide)
            x[rows].addcmul_(torch.addmm(last.bias, wide, last.weight.t()), g[5])


class Quantiser(nn.Module):
    """Nearest codebook entry with a straight-through gradient [van den Oord 2017, eq. 3]."""

    ROWS = 8192  # positions compared at once: 8192 x 8192 distances are 256 MB

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        # This skips the normal draw of nn.Embedding, which on the meta device imports torch's compiler.
        self.codebook = nn.Embedding.from_pretrained(torch.empty(codes, width), freeze=False)

    def reset_parameters(self) -> None:
        bound = 1 / self.codebook.num_embeddings
        nn.init.uniform_(self.codebook.weight, -bound, bound)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code of each row of z (N,c), lowest index first among equals; int64 (N,)."""
        codes = self.codebook.weight.float()  # distances are differences of close numbers: float32
        codes_squared = codes.square().sum(1)
        found = []
        for rows in torch.split(z.float(), self.ROWS):
            squared = codes_squared + rows.square().sum(1, keepdim=True)
            found.append(torch.addmm(squared, rows, codes.T, alpha=-2).argmin(1))
        return torch.cat(found)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B,4,h,w) -> codes with gradient to z, indices (B,h,w), loss ()."""
        rows = z.permute(0, 2, 3, 1)  # (B,h,w,4)
        indices = self.nearest(rows.reshape(-1, rows.shape[-1])).view(rows.shape[:-1])
        codes = self.codebook(indices)  # (B,h,w,4)
        loss = F.mse_loss(codes, rows.detach()) + 0.25 * F.mse_loss(rows, codes.detach())
        through = rows + (codes - rows).detach()
        return through.permute(0, 3, 1, 2), indices, loss


class StageA(nn.Module):
    """Pixels (B,3,4h,4w) in [0,1] <-> latents_b (B,4,h,w). Any h and w; the factor is 2**levels."""

    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.config = config
        widths, latent = config.widths, config.latent_channels
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 1))
        down: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level > 0:
                down.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
            down.append(MixingBlock(width, 4 * width))
        down.append(nn.Sequential(nn.Conv2d(widths[-1], latent, 1, bias=False), nn.BatchNorm2d(latent)))
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = Quantiser(config.codes, latent)
        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent, widths[-1], 1))]
        for level in reversed(range(config.levels)):
            blocks = config.bottleneck_blocks if level == config.levels - 1 else 1
            up += [MixingBlock(widths[level], 4 * widths[level]) for _ in range(blocks)]
            if level > 0:
                up.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], 12, 1), nn.PixelShuffle(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mixing blocks Xavier-uniform with zero gates, a small codebook; all else as torch has it."""
        for module in self.modules():
            if isinstance(module, MixingBlock | Quantiser):
                module.reset_parameters()

    def _through(self, blocks: nn.Sequential, x: Tensor, fused: bool) -> Tensor:
        if not fused or torch.is_grad_enabled():
            return blocks(x)
        buffer = Buffer()
        for block in blocks:
            x = block.overwrite(x, buffer) if isinstance(block, MixingBlock) else block(x)
        return x

    def _encode(self, pixels: Tensor) -> Tensor:
        factor = 2**self.config.levels
        if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
            size = f"{pixels.shape[-2]}x{pixels.shape[-1]}"
            raise ValueError(f"Stage A needs sides that are multiples of {factor}, the picture is {size}.")
        x = self.in_block[0](pixels).contiguous(memory_format=torch.channels_last)  # (B,12,2h,2w)
        return self._through(self.down_blocks, self.in_block[1](x), fused=True)  # (B,4,h,w)

    def encode(self, pixels: Tensor) -> Tensor:
        """Continuous latents, already divided by the scale: pixels (B,3,4h,4w) in [0,1] -> (B,4,h,w)."""
        return self._encode(pixels) / self.config.scale

    def encode_quantised(self, pixels: Tensor) -> Quantised:
        """As `encode`, with the nearest codes and their loss; for training Stage A itself."""
        z = self._encode(pixels)
        codes, indices, loss = self.vquantizer(z)
        return Quantised(codes / self.config.scale, z / self.config.scale, indices, loss)

    def decode(self, latents_b: Tensor, fused: bool = True) -> Tensor:
        """Pixels (B,3,4h,4w), about [0,1] but not clamped, from latents_b (B,4,h,w).

        Where no gradient is needed, `fused` blocks work in place and in spans: faster, in less memory.
        """
        z = (latents_b * self.config.scale).contiguous(memory_format=torch.channels_last)
        return self.out_block(self._through(self.up_blocks, z, fused))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantised]:
        """One training pass through the codes: the reconstruction and what `encode_quantised` returned."""
        quantised = self.encode_quantised(pixels)
        return self.decode(quantised.codes), quantised


class Discriminator(nn.Module):
    """Probability that each patch of a picture is real: pixels (B,3,H,W) -> (B,1,H/2**depth, W/2**depth)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        if config.depth < 4:
            raise ValueError(f"The discriminator needs a depth of at least 4, not {config.depth}.")
        self.config = config
        layers: list[nn.Module] = []
        for i, width in enumerate(config.widths):
            before = config.in_channels if i == 0 else config.widths[i - 1]
            # The older spectral norm has `weight_orig`, `weight_u`, `weight_v`: the official names.
            layers.append(nn.utils.spectral_norm(nn.Conv2d(before, width, 3, stride=2, padding=1)))
            if i > 0:
                layers.append(nn.InstanceNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
        self.encoder = nn.Sequential(*layers)
        self.shuffle = nn.Conv2d(config.widths[-1] + config.cond_width, 1, 1)

    def forward(self, pixels: Tensor, cond: Tensor | None = None) -> Tensor:
        """pixels (B,3,H,W) with at least 2x2 left after `depth` halvings; cond (B,cond_width) or None."""
        least = 2**self.config.depth + 1
        if min(pixels.shape[-2:]) < least:
            size = f"{pixels.shape[-2]}x{pixels.shape[-1]}"
            raise ValueError(f"The discriminator needs sides of at least {least} pixels, not {size}.")
        x = self.encoder(pixels)
        if cond is not None:
            x = torch.cat([x, cond[:, :, None, None].expand(-1, -1, *x.shape[-2:])], dim=1)
        return torch.sigmoid(self.shuffle(x))


STAGE_A = {
    "full": StageAConfig(),
    "mini": StageAConfig(width=64, bottleneck_blocks=4, codes=1024),
    "tiny": StageAConfig(width=16, bottleneck_blocks=1, codes=32),
}
DISCRIMINATOR = {
    "full": DiscriminatorConfig(),
    "mini": DiscriminatorConfig(width=128, depth=4),
    "tiny": DiscriminatorConfig(width=16, depth=4),
}
