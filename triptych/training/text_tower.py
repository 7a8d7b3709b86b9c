"""The text tower as a part that learns beside Stage C, where `diffusion.train_text` says so.

Stage B reads the tower's pooled vectors too: one whose Stage C was trained so goes on with the moved vectors.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from torch import nn

from triptych.checkpoints.files import PartInfo, read_header
from triptych.checkpoints.headers import part_info
from triptych.checkpoints.lora_merge import with_licence
from triptych.conditioning.encode import TextEncoder
from triptych.errors import SettingsError
from triptych.models.minilm import MiniLM
from triptych.training.config import RunSettings
from triptych.training.encoders import part_path

WORDS = "tokenizer.json"  # beside the weights


def learning_tower(text: TextEncoder) -> nn.Module:
    """The tower, ready to learn. Raises SettingsError for CLIP towers, which no part file of ours holds."""
    if not isinstance(text.tower, MiniLM):
        raise SettingsError(
            "diffusion.train_text: only text encoders that are part files of triptych can be trained and "
            "written; leave it out for a CLIP tower."
        )
    return text.tower.requires_grad_(True)


def tower_info(settings: RunSettings) -> PartInfo:
    """What the trained tower's file says: as the one it began with, with this run's name and licence."""
    stated = part_info(read_header(part_path("text_encoder", settings.parts.text_encoder)))
    assert stated is not None
    own = dataclasses.replace(
        stated, recipe=settings.name or settings.recipe, licence=settings.licence, notice=settings.notice
    )
    joined = with_licence(stated, own)
    return dataclasses.replace(own, licence=joined.licence, notice=joined.notice)


def copy_tokenizer(settings: RunSettings, out: Path) -> None:
    """The tokenizer of a trained tower, beside the part file that is written."""
    words = part_path("text_encoder", settings.parts.text_encoder).with_name(WORDS)
    if words.resolve() != (out / WORDS).resolve():
        shutil.copyfile(words, out / WORDS)
