"""Recorded CLIP towers and their image preprocessing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.conditioning.encode import centre_square
from triptych.models import clip


def check_clip_towers(golden: Any) -> dict[str, Tensor]:
    """Tiny towers: states before the final norm, pooled text, image embeddings after both resizes."""
    text = clip.on_meta(clip.ClipText, golden.config["text"])
    text.network.load_state_dict(golden.under("w.text."), assign=True)
    image = clip.on_meta(clip.ClipImage, golden.config["image"])
    image.network.load_state_dict(golden.under("w.image."), assign=True)
    out = {}
    with torch.no_grad():
        hidden, pooled = text(golden["in.ids"], golden["in.mask"])
        out["out.text_hidden"], out["out.text_pooled"] = hidden, pooled[:, None]
        out["out.last_hidden_state_not_used"] = text.network.text_model.final_layer_norm(hidden)
        for name, antialias in {"plain": False, "antialias": True}.items():
            square = centre_square(golden["in.pixels"], image.side, antialias)
            out[f"out.image_input.{name}"] = clip.normalise(square)
            out[f"out.image_embed.{name}"] = image(square)[:, None]
    return out


CHECKS = {"clip_towers": check_clip_towers}
