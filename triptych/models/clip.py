"""The published CLIP towers [Radford 2021, Cherti 2022]: text ViT-bigG/14 and image ViT-L/14.

The networks are those of the transformers library, imported only when one is built. Weights come in as
tensors under the names of the hub's `text_encoder/model.safetensors` and `image_encoder/model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipText(nn.Module):
    """Token ids to the hidden states and the pooled vector that the cascade was trained on."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the content of the hub's `text_encoder/config.json`."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        self.config = dict(config)
        self.network = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(self.config))
        self.width = int(self.network.config.hidden_size)
        self.vocabulary = int(self.network.config.vocab_size)
        self.positions = int(self.network.config.max_position_embeddings)
        self.vocabulary = int(self.network.config.vocab_size)
        self.positions = int(self.network.config.max_position_embeddings)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`text_hidden` (B, n, width) and `text_pooled` (B, projection) of `ids` and `mask` (B, n).

        `text_hidden` is the last layer's output before the final norm, at every position; the mask (padding
        last) changes padding positions only, but Stage C reads those too. `text_pooled` is the normed and
        projected state of the end token, the last one that the mask lets through.
        """
        text = self.network.text_model
        output = text(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        hidden = output.hidden_states[-1]
        ends = mask.long().sum(1) - 1
        pooled = hidden[torch.arange(len(ids), device=ids.device), ends]  # (B, width)
        return hidden, self.network.text_projection(text.final_layer_norm(pooled))


class ClipImage(nn.Module):
    """Pictures to projected image embeddings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the content of the hub's `image_encoder/config.json`."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self.config = dict(config)
        self.network = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(self.config))
        self.width = int(self.network.config.projection_dim)
        self.side = cast(int, self.network.config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, projection) of squares (B, 3, side, side) in [0, 1]."""
        prepared = normalise(pixels).to(self.network.visual_projection.weight.dtype)
        return cast(Tensor, self.network(pixel_values=prepared).image_embeds)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as CLIP was trained on them: mean 0 and deviation 1 over its training set, float32."""
    pixels = pixels.float()
    mean = pixels.new_tensor(PIXEL_MEAN)[:, None, None]
    return (pixels - mean) / pixels.new_tensor(PIXEL_STD)[:, None, None]


Tower = TypeVar("Tower", ClipText, ClipImage)


def on_meta(kind: type[Tower], config: Mapping[str, Any]) -> Tower:
    """A tower without weights, ready to be given tensors; `tower.network` has the hub's names."""
    with torch.device("meta"):
        tower = kind(config)
    # The position numbers are a plain count that files do not store.
    for module in tower.modules():
        numbers = getattr(module, "position_ids", None)
        if isinstance(numbers, Tensor):
            module.position_ids = torch.arange(numbers.shape[-1])[None]
    return tower.eval().requires_grad_(False)


CLIP_TEXT: dict[str, dict[str, Any]] = {
    "bigg": {
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "tiny": {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 24,
        "hidden_act": "gelu",
    },
}

CLIP_IMAGE: dict[str, dict[str, Any]] = {
    "vit-l": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 16,
        "hidden_act": "quick_gelu",
    },
}
