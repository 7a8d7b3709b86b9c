"""The frozen parts of a run, and what Stages B and C learn from: latents and embeddings of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.checkpoints.catalog import PACKAGED, PUBLISHED, find_model, package_folder, scan
from triptych.checkpoints.load import load_part
from triptych.conditioning.encode import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from triptych.errors import SettingsError, nearest
from triptych.pipelines.placement import Placement, place
from triptych.training.config import PartsSettings


@dataclass
class Encoders:
    """Frozen networks in eval mode; None where the recipe does not need one."""

    stage_a: nn.Module | None = None
    semantic: nn.Module | None = None
    text: TextEncoder | None = None
    image: ImageEncoder | None = None
    empty: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # the empty caption, by windows
    text_learns: bool = False  # then nothing it said is kept, and gradients reach it

    def release(self) -> None:
        """Let go of what a cache has made superfluous: everything but the text encoder."""
        self.stage_a = self.semantic = self.image = None

    def empty_text(self, windows: int) -> tuple[Tensor, Tensor]:
        """`text_hidden` (1, n, Wt) and `text_pooled` (1, Wp) of the empty caption in so many windows."""
        assert self.text is not None
        if self.text_learns:
            return self.read_text([""], windows)
        if windows not in self.empty:
            self.empty[windows] = self.read_text([""], windows)
        return self.empty[windows]

    def read_text(self, captions: Sequence[str], windows: int | None = None) -> tuple[Tensor, Tensor]:
        """`text_hidden` (B, n, Wt) and `text_pooled` (B, Wp), with gradients where the tower learns."""
        assert self.text is not None
        read = self.text.encode_with_gradient if self.text_learns else self.text.encode
        return read(captions, windows)


@dataclass
class Encoded:
    """One batch as the diffusion stages see it, float32. `latents_b` is None where only Stage C learns."""

    latents_c: Tensor  # (B, 16, h, w)
    latents_b: Tensor | None  # (B, 4, H, W)
    text_hidden: Tensor  # (B, n, Wt)
    text_pooled: Tensor  # (B, Wp)
    image_embed: Tensor | None  # (B, Wi)
    mask: Tensor | None = None  # (B, 1, H/4, W/4) in [0, 1], 1 where the picture matters; None: everywhere
    objects: Tensor | None = None  # (B, 2, h, w), see `object_map`; None where no picture says what it shows
    prototype: Tensor | None = None  # (B, 16, 8, 8) as `guess_loss` takes them
    text_other: Tensor | None = None  # (B, Wp) of another caption of each picture; None if unasked


def shrink_mask(mask: Tensor) -> Tensor:
    """A mask of pixels (B,1,H,W) as `Encoded` holds it: means of 4x4 pixels, those of Stage A's latents."""
    return F.avg_pool2d(mask, 4)


def part_path(part: str, given: str, setting: str = "") -> Path:
    """The file (or folder, of a published tower) of a part: a path, or the part of a model known by name.

    `setting` is what errors call it, parts.PART by default. Raises SettingsError when there is none.
    """
    path, setting = Path(given), setting or f"parts.{part}"
    if path.is_file():
        return path
    if path.suffix == ".safetensors":
        raise SettingsError(f"{setting}: {given} does not exist; train it first, or name another file.")
    if given in PUBLISHED and not path.is_dir():
        found: Path | None = getattr(find_model(given), part)
    else:
        folder = package_folder(given) if given in PACKAGED else path
        if not folder.is_dir():
            known = (*PACKAGED, *PUBLISHED)
            raise SettingsError(f'{setting}: there is no model or file "{given}"; {nearest(given, known)}.')
        own = folder / f"{part}.safetensors"  # a run's folder also holds files that are no part
        found = own if own.is_file() else scan(folder, {}, {}).get(part)
    if found is None:
        raise SettingsError(f'{setting}: the model "{given}" has no {part}; train one, or name its file.')
    return found


def load_encoders(
    parts: PartsSettings, needed: Sequence[str], device: torch.device, as_stored: bool = False
) -> Encoders:
    """Load the frozen parts named in `needed`: stage_a, semantic, text_encoder, image_encoder.

    They are float32; towers remain `as_stored` for a caller that says how else to hold them.
    """
    encoders = Encoders()
    if "stage_a" in needed:
        encoders.stage_a = frozen("stage_a", parts.stage_a, device)
    if "semantic" in needed:
        encoders.semantic = frozen("semantic", parts.semantic, device)
    if "text_encoder" in needed:
        encoders.text = load_text_encoder(part_path("text_encoder", parts.text_encoder))
        settle(encoders.text.tower, parts, device, as_stored)
    if "image_encoder" in needed and parts.image_encoder is not None:
        encoders.image = load_image_encoder(part_path("image_encoder", parts.image_encoder))
        settle(encoders.image.tower, parts, device, as_stored)
    return encoders


def settle(tower: Any, parts: PartsSettings, device: torch.device, as_stored: bool) -> None:
    """A frozen tower on the device; with `parts.offload` only the layer that runs is there."""
    if parts.offload:
        place(tower, Placement(device, weights="streamed"))
    else:
        tower.to(device, None if as_stored else torch.float32)


def frozen(part: str, given: str, device: torch.device) -> nn.Module:
    """A part in float32, eval mode, without gradients."""
    network, _ = load_part(part_path(part, given), part, device=device, dtype=torch.float32)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(
    encoders: Encoders, pixels: Tensor, semantic_pixels: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """latents_c, latents_b, image embeddings of pixels (B,3,H,W); `semantic_pixels` may be smaller ones."""
    assert encoders.semantic is not None
    latents_c = encoders.semantic(pixels if semantic_pixels is None else semantic_pixels)
    latents_b = None
    if encoders.stage_a is not None:
        latents_b = encoders.stage_a.encode(pixels)  # type: ignore[operator]
    image = None if encoders.image is None else encoders.image.encode(pixels)
    return latents_c, latents_b, image
