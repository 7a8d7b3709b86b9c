"""A whole cascade at size "tiny" with random weights, written in our own layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.checkpoints.files import PartInfo, write_part
from triptych.models.image_tower import IMAGE_TOWER, ImageTower
from triptych.models.minilm import MINILM, MiniLM
from triptych.models.semantic import PREVIEWER, SEMANTIC, Previewer, SemanticEncoder
from triptych.models.stage_a import STAGE_A, StageA
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "apple",
    "star",
    "circle",
    "square",
    "on",
    "white",
    "sky",
    "the",
    "with",
]
TEXT = dataclasses.replace(MINILM["tiny"], width=384, heads=4)
STAGE_C_SETTINGS: dict[str, Any] = {
    "prediction": "v",  # bounded whatever a random network answers
    "shift": 2.0,
    "pixels_per_latent": 32,
    "default_size": [64, 64],
    "size_multiple": 8,
    "steps": 3,
    "guidance": 4.0,
    "rescale": 0.7,
    "sampler": "ddpm",
    "text_encoder": "minilm",
    "image_encoder": "small",
}
STAGE_B_SETTINGS: dict[str, Any] = {
    "prediction": "v",  # bounded whatever a random network answers
    "shift": 1.0,
    "steps": 2,
    "guidance": 1.1,
    "rescale": 0.7,
    "sampler": "ddpm",
}


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Give zero-born layers something to say, so that every input reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def write_tiny_cascade(folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write every part of a tiny cascade into `folder`; `dtype` narrows Stages B and C. Returns `folder`."""
    torch.manual_seed(0)
    parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "stage_c": (StageC(STAGE_C["tiny"]), STAGE_C_SETTINGS),
        "stage_b": (StageB(STAGE_B["tiny"]), STAGE_B_SETTINGS),
        "stage_a": (StageA(STAGE_A["tiny"]), {}),
        "semantic": (SemanticEncoder(SEMANTIC["tiny"]), {}),
        "previewer": (Previewer(PREVIEWER["tiny"]), {}),
        "image_encoder": (ImageTower(dataclasses.replace(IMAGE_TOWER["tiny"], width=384)), {}),
        "text_encoder": (MiniLM(TEXT), {"text_encoder": "minilm", "window": 8}),
    }
    for seed, (part, (network, settings)) in enumerate(parts.items()):
        config = json.loads(json.dumps(dataclasses.asdict(network.config)))
        info = PartInfo(part, config=config, settings=settings, recipe="tests", licence="CC0-1.0")
        stored = dtype if part in ("stage_b", "stage_c") else None
        write_part(folder / f"{part}.safetensors", randomise(network, seed).state_dict(), info, stored)
    (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer()), encoding="utf-8")
    return folder


def word_tokenizer() -> dict[str, Any]:
    """A WordPiece vocabulary of a few words and all letters, in the tokenizers library's file format."""
    pieces = [chr(code) for code in range(33, 127)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *pieces]
    names += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    special = [
        {"id": vocabulary[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
