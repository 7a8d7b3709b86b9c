"""What people would like: small heads over frozen towers, trained on people's ratings.

`RewardHead` is the head of LAION's aesthetic predictor (over CLIP ViT-L/14 embeddings) and of ImageReward
[Xu 2023]; parameter names are those of both published files (`layers.N.weight`). `ImageReward` puts it on
BLIP [Li 2022], whose text tower looks at the picture; the towers are those of the transformers library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from triptych.models.clip import HEAD_WIDTH, normalise

HEAD_LAYERS = (0, 2, 4, 6, 7)  # those with weights; the others are dropout, which judging does without
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # over ImageReward's training pictures
VISION_EPS = 1e-6  # of BLIP's image tower


class RewardHead(nn.Module):
    """Linear layers one after the other, without activations, as published."""

    def __init__(self, widths: Sequence[int] = (768, 1024, 128, 64, 16, 1)) -> None:
        super().__init__()
        pairs = zip(HEAD_LAYERS, widths, widths[1:], strict=False)
        self.layers = nn.ModuleDict({str(n): nn.Linear(inputs, outputs) for n, inputs, outputs in pairs})

    def forward(self, x: Tensor) -> Tensor:
        """Ratings (B,) of vectors (B, width)."""
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


def head_widths(shapes: Mapping[str, Sequence[int]], prefix: str = "") -> list[int]:
    """The widths of a head with these shapes. Raises KeyError naming a tensor that is missing."""
    weights = [shapes[f"{prefix}layers.{number}.weight"] for number in HEAD_LAYERS]
    return [weights[0][1], *(weight[0] for weight in weights)]


@dataclass(frozen=True)
class BlipConfig:
    """BLIP with ViT-L/16 and a BERT that looks at the picture, as ImageReward uses it."""

    image_width: int = 1024
    image_layers: int = 24
    image_mlp: int = 4096
    image_side: int = 224
    patch: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_mlp: int = 3072
    vocabulary: int = 30524
    positions: int = 512
    head: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)


class ImageReward(nn.Module):
    """How well people would like a picture for its prompt; 0 is the average, 1 a deviation above it."""

    def __init__(self, config: BlipConfig) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.side = config.image_side
        self.image = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=config.image_width,
                intermediate_size=config.image_mlp,
                num_hidden_layers=config.image_layers,
                num_attention_heads=max(1, config.image_width // HEAD_WIDTH),
                image_size=config.image_side,
                patch_size=config.patch,
                layer_norm_eps=VISION_EPS,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.text_width,
                encoder_hidden_size=config.image_width,
                intermediate_size=config.text_mlp,
                num_hidden_layers=config.text_layers,
                num_attention_heads=max(1, config.text_width // HEAD_WIDTH),
                max_position_embeddings=config.positions,
                is_decoder=True,  # gives it the layers that look at the picture
            ),
            add_pooling_layer=False,
        )
        self.head = RewardHead(config.head)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,) of squares (B,3,side,side) in [0,1] and token `ids` with `mask` (B,n)."""
        seen = self.image(pixel_values=normalise(pixels)).last_hidden_state  # (B, patches + 1, width)
        read = self.text(ids, attention_mask=mask.long(), encoder_hidden_states=seen, is_decoder=False)
        reward = self.head(read.last_hidden_state[:, 0].float())
        return cast(Tensor, (reward - REWARD_MEAN) / REWARD_STD)
