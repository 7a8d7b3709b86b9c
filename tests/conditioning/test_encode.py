"""Prompts to conditioning: windows, batches, the unconditional branch, image embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_folders import write_text_encoder, write_tokenizer

import triptych
from triptych.checkpoints.files import PartInfo, write_part
from triptych.checkpoints.load import config_fields
from triptych.conditioning.encode import (
    ImageEncoder,
    TextEncoder,
    cat,
    condition,
    load_image_encoder,
    load_text_encoder,
    unconditional,
)
from triptych.models.image_tower import IMAGE_TOWER, ImageTower

SHIPPED = Path(triptych.__file__).parent / "weights" / "mini" / "text_encoder.safetensors"
LONG = "a quiet landscape with many small hills and a river " * 20  # 200 words


@pytest.fixture(scope="module", params=["minilm", "clip"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    if request.param == "minilm":
        return load_text_encoder(SHIPPED)
    folder = tmp_path_factory.mktemp("hub")
    write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return load_text_encoder(folder)


def test_long_prompts_are_joined_windows(encoder: TextEncoder) -> None:
    count = encoder.count_windows(LONG)
    hidden, pooled = encoder.encode([LONG])
    assert count > 3
    assert hidden.shape == (1, count * encoder.window, encoder.width)
    assert torch.isfinite(hidden).all()
    first = encoder.tokenizer.windows(LONG)[0]
    alone, alone_pooled = encoder.tower(torch.tensor([first.ids]), torch.tensor([first.mask]))
    torch.testing.assert_close(hidden[:, : encoder.window], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, alone_pooled, rtol=0, atol=1e-5)


def test_a_word_in_the_second_window_matters(encoder: TextEncoder) -> None:
    start = "very " * encoder.window
    fox, fox_pooled = encoder.encode([start + "fox"])
    owl, owl_pooled = encoder.encode([start + "owl"])
    length = encoder.window
    torch.testing.assert_close(fox[:, :length], owl[:, :length], rtol=0, atol=1e-5)
    assert (fox[:, length:] - owl[:, length:]).abs().max() > 0.01
    torch.testing.assert_close(fox_pooled, owl_pooled, rtol=0, atol=1e-5)


def test_short_prompts_beside_long_ones_go_on_with_the_empty_prompt(encoder: TextEncoder) -> None:
    hidden, pooled = encoder.encode(["a fox", LONG, ""])
    short, short_pooled = encoder.encode(["a fox"])
    empty, _ = encoder.encode([""])
    count = encoder.count_windows(LONG)
    torch.testing.assert_close(hidden[0], torch.cat([short, *[empty] * (count - 1)], 1)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden[2], torch.cat([empty] * count, 1)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[0], short_pooled[0], rtol=0, atol=1e-5)
    widened, _ = encoder.encode(["a fox"], windows=count)
    torch.testing.assert_close(widened, hidden[:1], rtol=0, atol=1e-5)


def test_empty_prompt_and_empty_branch_are_the_same(encoder: TextEncoder) -> None:
    prompts = condition(encoder, ["a fox", LONG], torch.rand(2, 3, 16))
    nothing = unconditional(encoder, prompts)
    assert nothing.text_hidden.shape == prompts.text_hidden.shape
    assert nothing.text_pooled.shape == prompts.text_pooled.shape == (2, 1, prompts.text_pooled.shape[-1])
    assert nothing.image_embed.shape == (2, 3, 16)
    assert not nothing.image_embed.any()
    empty, _ = encoder.encode([""])
    torch.testing.assert_close(nothing.text_hidden[1, : encoder.window], empty[0], rtol=0, atol=1e-5)
    both = cat(prompts, nothing)
    assert len(both) == 4
    assert torch.equal(both.text_hidden[2:], nothing.text_hidden)


def test_image_embeddings_none_one_and_several(encoder: TextEncoder) -> None:
    none = condition(encoder, ["a fox"] * 2, image_width=24)
    assert none.image_embed.shape == (2, 1, 24)
    assert not none.image_embed.any()
    embed = torch.rand(2, 24)
    assert torch.equal(condition(encoder, ["a fox"] * 2, embed).image_embed, embed[:, None])
    several = torch.rand(2, 4, 24)
    assert torch.equal(condition(encoder, ["a fox"] * 2, several).image_embed, several)


def test_repeat_and_move(encoder: TextEncoder) -> None:
    two = condition(encoder, ["a fox", "an owl"])
    six = two.repeat(3).to(dtype=torch.float64)
    assert len(six) == 6
    assert {t.dtype for t in (six.text_hidden, six.text_pooled, six.image_embed)} == {torch.float64}
    assert torch.equal(six.text_hidden[2].float(), two.text_hidden[0])
    assert torch.equal(six.text_hidden[3].float(), two.text_hidden[1])


def test_text_is_taken_literally(encoder: TextEncoder) -> None:
    plain, _ = encoder.encode(["a fox"])
    for prompt in ("a (fox:1.3)", "a [fox]", "a ((fox))"):
        assert (encoder.encode([prompt])[0] - plain).abs().max() > 1e-3


@torch.no_grad()
def test_small_image_tower_answers_for_any_size() -> None:
    encoder = ImageEncoder(ImageTower(IMAGE_TOWER["tiny"]).eval())
    pixels = torch.rand(3, 3, 40, 77)
    embeds = encoder.encode(pixels)
    assert embeds.shape == (3, encoder.width)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder.encode(pixels[1:2])[0], embeds[1], rtol=0, atol=1e-5)


def test_an_image_encoder_stored_in_half_precision_sees_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = ImageTower(IMAGE_TOWER["tiny"])
    info = PartInfo("image_encoder", config=config_fields(tower.config))
    pixels = torch.rand(2, 3, 40, 50)
    seen = []
    for dtype in (torch.float32, torch.float16):
        write_part(tmp_path / "image_encoder.safetensors", tower.state_dict(), info, dtype)
        seen.append(load_image_encoder(tmp_path / "image_encoder.safetensors").encode(pixels))
    assert torch.nn.functional.cosine_similarity(*seen).min() > 0.999
