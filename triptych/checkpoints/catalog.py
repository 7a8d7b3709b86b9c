"""The models that can be named, the settings published weights were made for, and finding their files.

    mini           inside the package
    cascade        Stage C 3.6b and Stage B 1.5b from the hub, `stabilityai/stable-cascade`
    cascade-lite   Stage C 1b and Stage B 700m, same place; the image tower is in `stable-cascade-prior`
    owner/name     any other hub repository in a layout that triptych reads
    a path         a folder in the official, diffusers or triptych layout, or a ComfyUI file

Files in a folder are told apart by what is inside them, not by their names. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED_LICENCE = "Stability AI Non-Commercial Research Community License"
PUBLISHED_NOTICE = (
    "Stable Cascade's weights are published by Stability AI for non-commercial research use only "
    "(https://huggingface.co/stabilityai/stable-cascade); what is made from them carries that licence."
)
DECODER_REPO = "stabilityai/stable-cascade"
PRIOR_REPO = "stabilityai/stable-cascade-prior"


@dataclass(frozen=True)
class Published:
    """A published cascade: the sizes of Stages C and B it is made of."""

    stage_c: str
    stage_b: str
    summary: str


PUBLISHED = {
    "cascade": Published("3.6b", "1.5b", "Stable Cascade, full size"),
    "cascade-lite": Published("1b", "700m", "Stable Cascade, lite"),
}
PACKAGED = ("mini",)
MODEL_NAMES = (*PACKAGED, *PUBLISHED)

# Where each published part is: size -> (repository, file, parameters). 16-bit files, half the download.
STAGE_C_FILES = {
    "3.6b": (DECODER_REPO, "stage_c_bf16.safetensors", 3_589_103_632),
    "1b": (DECODER_REPO, "stage_c_lite_bf16.safetensors", 1_030_785_040),
}
STAGE_B_FILES = {
    "1.5b": (DECODER_REPO, "stage_b_bf16.safetensors", 1_562_941_136),
    "700m": (DECODER_REPO, "stage_b_lite_bf16.safetensors", 699_471_248),
}
SHARED_FILES = {
    "stage_a": (DECODER_REPO, "stage_a.safetensors", 18_406_894),
    "semantic": (DECODER_REPO, "effnet_encoder.safetensors", 20_197_968),
    "previewer": (DECODER_REPO, "previewer.safetensors", 3_979_651),
}

# What a pipeline needs to know about published weights, which say nothing about themselves.
PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "stage_c": {
        "prediction": "eps",
        "shift": 2.0,
        "pixels_per_latent": 42.67,
        "default_size": [1024, 1024],
        "size_multiple": 8,
        "steps": 20,
        "guidance": 4.0,
        "rescale": 0.7,
        "sampler": "ddpm",
        "text_encoder": "clip-bigg",
        "image_encoder": "clip-vit-l",
    },
    "stage_b": {
        "prediction": "eps",
        "shift": 1.0,
        "steps": 10,
        "guidance": 1.1,
        "rescale": 0.7,
        "sampler": "ddpm",
    },
}


def package_folder(name: str = "mini") -> Path:
    """The folder of weights that come with the package."""
    return Path(__file__).parent.parent / "weights" / name
