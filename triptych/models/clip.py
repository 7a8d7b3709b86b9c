"""The published CLIP towers [Radford 2021, Cherti 2022]: text ViT-bigG/14 and image ViT-L/14.

The networks are those of the transformers library, imported only when one is built. Weights come in as
tensors under the names of the hub's `text_encoder/model.safetensors` and `image_encoder/model.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64
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

    def token_table(self) -> tuple[nn.Module, str]:
        """The module that holds the token vectors, and its name there, for learned tokens."""
        return self.network.text_model.embeddings, "token_embedding"

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


def text_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The configuration of a text tower of the published kind, from the shapes of its tensors.

    For files that carry no config.json. Heads are 64 wide and the activation is the exact GELU, as in bigG.
    Raises KeyError naming a tensor that a text tower needs.
    """
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count_layers(shapes),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
        "hidden_act": "gelu",
    }


def image_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The same for an image tower; the activation is the quick GELU, as in ViT-L."""
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    patches = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    return {
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count_layers(shapes),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": patch * math.isqrt(patches),
        "patch_size": patch,
        "projection_dim": shapes["visual_projection.weight"][0],
        "hidden_act": "quick_gelu",
    }


def _count_layers(shapes: Mapping[str, Sequence[int]]) -> int:
    return len([name for name in shapes if name.endswith(".mlp.fc1.bias")])
