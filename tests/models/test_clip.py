"""The CLIP towers we wrap: the same numbers as the transformers library, from every layout they come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_folders import write_comfyui, write_image_encoder, write_text_encoder, write_tokenizer
from safetensors.torch import load_file, save_file

from triptych.conditioning.encode import (
    ImageEncoder,
    TextEncoder,
    centre_square,
    load_image_encoder,
    load_text_encoder,
)
from triptych.errors import CheckpointError

PROMPTS = ["", "a fox", "A  fox, in (snow:1.2)"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    write_image_encoder(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def text(hub: Path) -> TextEncoder:
    return load_text_encoder(hub)


@pytest.fixture(scope="module")
def image(hub: Path) -> ImageEncoder:
    return load_image_encoder(hub)


@torch.no_grad()
def test_text_equals_the_transformers_library(hub: Path, text: TextEncoder) -> None:
    from transformers import CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    theirs = CLIPTextModelWithProjection.from_pretrained(hub / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(hub / "tokenizer")
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    output = theirs(**tokens, output_hidden_states=True)
    hidden, pooled = text.encode(PROMPTS)
    torch.testing.assert_close(hidden, output.hidden_states[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, output.text_embeds, rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_equals_the_transformers_library(hub: Path, image: ImageEncoder) -> None:
    from transformers import CLIPVisionModelWithProjection

    theirs = CLIPVisionModelWithProjection.from_pretrained(hub / "image_encoder").eval()
    pixels = torch.rand(2, 3, 224, 224)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = theirs(pixel_values=(pixels - mean) / std).image_embeds
    torch.testing.assert_close(image.encode(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (224, 1000), (225, 224)])
def test_pictures_of_any_size_become_a_square(image: ImageEncoder, size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size)
    assert centre_square(pixels, 224).shape == (2, 3, 224, 224)
    assert image.encode(pixels).shape == (2, image.width)


def test_file_folder_and_parent_are_the_same(hub: Path, text: TextEncoder) -> None:
    expected, _ = text.encode(["a fox"])
    for path in (hub / "text_encoder", hub / "text_encoder" / "model.safetensors"):
        assert torch.equal(load_text_encoder(path).encode(["a fox"])[0], expected)


def test_weights_in_half_precision_answer_in_float32(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    narrow = {n: t.bfloat16() for n, t in load_file(hub / "text_encoder" / "model.safetensors").items()}
    save_file(narrow, tmp_path / "text_encoder" / "model.bf16.safetensors")
    encoder = load_text_encoder(tmp_path, hub / "tokenizer")
    hidden, pooled = encoder.encode(["a fox"])
    assert {hidden.dtype, pooled.dtype} == {torch.float32}
    assert next(iter(encoder.tower.parameters())).dtype == torch.bfloat16
    exact, _ = load_text_encoder(hub).encode(["a fox"])
    torch.testing.assert_close(hidden, exact, rtol=0, atol=0.1)


def test_comfyui_files_hold_the_same_towers(
    hub: Path, text: TextEncoder, image: ImageEncoder, tmp_path: Path
):
    file = write_comfyui(tmp_path) / "stable_cascade_stage_c.safetensors"
    expected = text.encode(["a fox"])
    for got, wanted in zip(
        load_text_encoder(file, hub / "tokenizer").encode(["a fox"]), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    pixels = torch.rand(1, 3, 100, 100)
    torch.testing.assert_close(
        load_image_encoder(file).encode(pixels), image.encode(pixels), rtol=0, atol=1e-6
    )


def test_old_comfyui_projection_is_turned(hub: Path, text: TextEncoder, tmp_path: Path) -> None:
    file = write_comfyui(tmp_path) / "stable_cascade_stage_b.safetensors"
    tensors = load_file(file)
    projection = tensors.pop("text_encoder.clip_g.transformer.text_projection.weight")
    tensors["text_encoder.clip_g.text_projection"] = projection.T.contiguous()
    old = tmp_path / "old.safetensors"
    save_file(tensors, old)
    _, pooled = load_text_encoder(old, hub / "tokenizer").encode(["a fox"])
    torch.testing.assert_close(pooled, text.encode(["a fox"])[1], rtol=0, atol=1e-6)


def test_messages(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_text_encoder(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="pickled"):
        load_text_encoder(tmp_path)
    weights = load_file(hub / "text_encoder" / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_text_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="an image encoder was expected"):
        load_image_encoder(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="hidden_size"):
        load_text_encoder(tmp_path)
    config = json.loads((hub / "text_encoder" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="names are missing"):
        load_text_encoder(tmp_path, hub / "tokenizer")
