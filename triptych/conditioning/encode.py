"""Prompts and pictures to the tensors that condition the networks.

Long prompts are read in windows: hidden states are joined along tokens, the pooled vector is that of the
first window. No attention mask reaches Stage C, so all prompts of one call get the same number of windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.conditioning.tokenizer import Tokenizer, Window
from triptych.conditioning.towers import load_image_tower, load_minilm_tower, load_text_tower
from triptych.models.lora import TokenTable


class TextTower(Protocol):
    """A network that reads windows of tokens: MiniLM, or the CLIP text tower."""

    @property
    def width(self) -> int: ...

    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def token_table(self) -> tuple[nn.Module, str]: ...


@dataclass(frozen=True)
class Conditioning:
    """What the networks are told about B pictures; batched, moved and repeated as one value."""

    text_hidden: Tensor  # (B, n, Wt)
    text_pooled: Tensor  # (B, 1, Wp)
    image_embed: Tensor  # (B, k, Wi), zeros when there is no picture to follow

    def __len__(self) -> int:
        return len(self.text_hidden)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another precision."""
        return Conditioning(
            self.text_hidden.to(device=device, dtype=dtype),
            self.text_pooled.to(device=device, dtype=dtype),
            self.image_embed.to(device=device, dtype=dtype),
        )

    def repeat(self, times: int) -> Conditioning:
        """Every row `times` times in a row: B becomes B * times."""
        return Conditioning(
            self.text_hidden.repeat_interleave(times, 0),
            self.text_pooled.repeat_interleave(times, 0),
            self.image_embed.repeat_interleave(times, 0),
        )


def cat(first: Conditioning, second: Conditioning) -> Conditioning:
    """The rows of `first`, then those of `second`; both need the same tokens and image embeddings per row."""
    return Conditioning(
        torch.cat([first.text_hidden, second.text_hidden]),
        torch.cat([first.text_pooled, second.text_pooled]),
        torch.cat([first.image_embed, second.image_embed]),
    )


class TextEncoder:
    """A tokenizer and its tower: prompts in, hidden states and pooled vectors out."""

    def __init__(self, tower: TextTower, tokenizer: Tokenizer) -> None:
        self.tower = tower
        self.tokenizer = tokenizer
        self.window = tokenizer.window  # tokens per window
        self.width = tower.width  # of text_hidden

    def count_windows(self, prompt: str) -> int:
        """How many windows `prompt` fills; at least one."""
        return self.tokenizer.count_windows(prompt)

    def learn(self, tokens: Mapping[str, Tensor]) -> TokenTable | None:
        """Know the names in `tokens`, each standing for its vectors (n, token width), and forget others.

        A name may be any text, usually in brackets: it is looked for in prompts as it is written. Returns the
        table whose `vectors` they now are, in the order of `tokens`; None for no tokens.
        """
        owner, name = self.tower.token_table()
        table = owner.get_submodule(name)
        table = table.table if isinstance(table, TokenTable) else table
        first = len(cast(Tensor, table.weight))
        self.tokenizer.learned = {}
        for token, vectors in tokens.items():
            self.tokenizer.learned[token] = tuple(range(first, first + len(vectors)))
            first += len(vectors)
        learned = None
        if tokens:
            weight = cast(Tensor, table.weight)
            vectors = torch.cat([*tokens.values()]).to(weight.device, torch.float32)
            ids = torch.arange(first - len(vectors), first, device=weight.device)
            learned = TokenTable(table, ids, vectors)
        setattr(owner, name, learned or table)
        return learned

    def token_vectors(self, text: str) -> Tensor:
        """The tower's own vectors (n, token width) of the tokens of `text`, float32."""
        owner, name = self.tower.token_table()
        table = owner.get_submodule(name)
        device = next(self.tower.parameters()).device
        ids = torch.tensor([self.tokenizer.ids(text)], dtype=torch.long, device=device)
        with torch.no_grad():
            return cast(Tensor, table(ids)[0].float())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], windows: int | None = None) -> tuple[Tensor, Tensor]:
        """`text_hidden` (B, windows * window, width) and `text_pooled` (B, Wp), float32, on its device.

        Each prompt is continued with windows of the empty prompt up to the longest of the call, or up to
        `windows` where that is more (so that a prompt and its negative can be made equally long).
        """
        return self.encode_with_gradient(prompts, windows)

    def encode_with_gradient(
        self, prompts: Sequence[str], windows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `encode`, for training what the tower reads (learned tokens, say)."""
        rows = [self.tokenizer.windows(prompt) for prompt in prompts]
        count = max(windows or 1, *map(len, rows))
        empty = self.tokenizer.windows("")
        rows = [row + empty * (count - len(row)) for row in rows]
        # Each different window is read once: paddings and repeated prompts cost nothing.
        different: dict[Window, int] = {}
        index = [different.setdefault(window, len(different)) for row in rows for window in row]
        device = next(self.tower.parameters()).device
        ids = torch.tensor([window.ids for window in different], device=device)
        mask = torch.tensor([window.mask for window in different], device=device)
        hidden, pooled = self.tower(ids, mask)  # (windows, window, width), (windows, Wp)
        places = torch.tensor(index, device=device)
        hidden = hidden.float()[places].view(len(rows), count * self.window, -1)
        return hidden, pooled.float()[places[::count]]


class ImageTower(Protocol):
    """A network that looks at squares of `side` pixels: the CLIP image tower, or our small one."""

    @property
    def side(self) -> int: ...

    @property
    def width(self) -> int: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class ImageEncoder:
    """Pictures of any size in, embeddings out."""

    def __init__(self, tower: ImageTower) -> None:
        self.tower = tower
        self.width = tower.width

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, width), float32, on the tower's device, of pictures (B, 3, H, W) in [0, 1]."""
        device = next(self.tower.parameters()).device
        return self.tower(centre_square(pixels.to(device), self.tower.side)).float()


def centre_square(pixels: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Bring the shorter side of (B, 3, H, W) to `side`, cut out the middle: (B, 3, side, side) float32.

    Bicubic. The release resized with the torchvision of its day, which did not antialias tensors; current
    versions do, and without it large photographs lose thin lines, so it is the default here.
    """
    height, width = pixels.shape[-2:]
    # The longer side is rounded down and the corner rounded to even, as torchvision does.
    size = (side, side * width // height) if height <= width else (side * height // width, side)
    pixels = pixels.float()
    if size != (height, width):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return pixels[..., top : top + side, left : left + side]


def load_text_encoder(path: Path | str, tokenizer: Path | str | None = None) -> TextEncoder:
    """The text encoder of any model; paths and errors are those of `towers.load_text_tower`."""
    return TextEncoder(*load_text_tower(path, tokenizer))


def load_minilm(path: Path | str, tokenizer: Path | str | None = None) -> TextEncoder:
    """The small text encoder from a part file; errors are those of `towers.load_minilm_tower`."""
    return TextEncoder(*load_minilm_tower(path, tokenizer))


def load_image_encoder(path: Path | str) -> ImageEncoder:
    """The image encoder of any model; paths and errors are those of `towers.load_image_tower`."""
    return ImageEncoder(load_image_tower(path))


def condition(
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    image_embed: Tensor | None = None,
    *,
    image_width: int = 768,
    windows: int | None = None,
) -> Conditioning:
    """Conditioning for B `prompts`.

    `image_embed` is (B, Wi), or (B, k, Wi) for k pictures each; without one it is zeros (B, 1, image_width).
    `windows` is the least number of text windows (see `TextEncoder.encode`).
    """
    hidden, pooled = text_encoder.encode(prompts, windows)
    if image_embed is None:
        image_embed = hidden.new_zeros(len(prompts), 1, image_width)
    elif image_embed.ndim == 2:
        image_embed = image_embed[:, None]
    return Conditioning(hidden, pooled[:, None], image_embed.to(hidden.device, torch.float32))


def unconditional(text_encoder: TextEncoder, like: Conditioning) -> Conditioning:
    """What guidance is measured against: the empty prompt and no picture, shaped as `like`."""
    windows = like.text_hidden.shape[1] // text_encoder.window
    nothing = condition(text_encoder, [""], torch.zeros_like(like.image_embed[:1]), windows=windows)
    return nothing.repeat(len(like)).to(like.text_hidden.device, like.text_hidden.dtype)
