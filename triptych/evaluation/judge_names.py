"""Names of published judges' tensors -> names of the transformers networks that they run in here.

`from_open_clip` is for HPS v2 (OpenCLIP's layout), `from_image_reward` for ImageReward (BLIP's own layout).
Both take whole files and leave out what judging does not use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# OpenCLIP: resblocks in both towers; `visual.` before those of the picture.
OPEN_CLIP = (
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}

BLIP_IMAGE = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names to those of transformers' CLIPModel; attention is split in three."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if name in PROJECTIONS:
            found[PROJECTIONS[name]] = tensor.T.contiguous()
        elif name == "logit_scale":
            found[name] = tensor
        elif joint := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                place = _renamed(joint[1] + ".", OPEN_CLIP)
                found[f"{place}self_attn.{letter}_proj.{joint[2]}"] = third
        elif (new := _renamed(name, OPEN_CLIP)) != name:
            found[new] = tensor
    return found


def from_image_reward(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's names to those of `models.reward.ImageReward`; the unused heads of BLIP are left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            rest = name.removeprefix("blip.visual_encoder.")
            found["image." + _renamed(rest, BLIP_IMAGE)] = tensor
        elif name.startswith("blip.text_encoder."):
            rest = name.removeprefix("blip.text_encoder.").removeprefix("bert.")
            if not rest.startswith(("pooler.", "cls.")) and rest != "embeddings.position_ids":
                found["text." + rest] = tensor
        elif name.startswith("mlp."):
            found["head." + name.removeprefix("mlp.")] = tensor
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name
