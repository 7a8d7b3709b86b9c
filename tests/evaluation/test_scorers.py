"""Published judges, as tiny random networks in their published layouts, equal the libraries' own answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import published_folders
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from triptych.data.shapes import draw_shapes
from triptych.errors import CheckpointError
from triptych.evaluation.scorers import cropped, open_scorers, padded
from triptych.models.reward import REWARD_MEAN, REWARD_STD

PROMPTS = ["a red circle", "two blue stars and a very long tail of words " * 5]
MEAN, DEVIATION = (
    np.array([0.48145466, 0.4578275, 0.40821073]),
    np.array([0.26862954, 0.26130258, 0.27577711]),
)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw_shapes(1, 64, 64).image, draw_shapes(2, 90, 60).image]


def write_clip(folder: Path) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=49407,
        projection_dim=12,
    )
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=12,
    )
    torch.manual_seed(5)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    )
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.2)
    published_folders.write_tokenizer(folder)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("judges")
    for name in ("clipscore", "pickscore", "aesthetic"):
        model = write_clip(folder / name)
    return model, folder


def prepared(images: list[Image.Image]) -> torch.Tensor:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return processor(images, return_tensors="pt").pixel_values


def tokens(folder: Path) -> torch.Tensor:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder)
    return words(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def test_clipscore_and_pickscore_equal_transformers_clip(
    judges: tuple[nn.Module, Path], pictures: list[Image.Image]
) -> None:
    model, folder = judges
    clipscore, pickscore = open_scorers(["clipscore", "pickscore"], folder)
    with torch.no_grad():
        logits = model(
            input_ids=tokens(folder / "clipscore"), pixel_values=prepared(pictures)
        ).logits_per_image
    theirs = logits.diagonal()
    cosine = theirs / model.logit_scale.exp()
    assert pickscore.of(pictures, PROMPTS) == pytest.approx(theirs.tolist(), abs=1e-3)
    assert clipscore.of(pictures, PROMPTS) == pytest.approx((100 * cosine).clamp(min=0).tolist(), abs=1e-3)
    assert cosine.abs().max() > 0.01


def test_clipscore_equals_torchmetrics(judges: tuple[nn.Module, Path], pictures: list[Image.Image]) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    model, folder = judges

    def processor(text=None, images=None, **_):  # what CLIPProcessor gives back, without torchvision
        if images is not None:
            return {"pixel_values": prepared(images)}
        ids = tokens(folder / "clipscore")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def image_features(pixels):
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(ids, mask):
        return model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)

    # Newer transformers wrap both in objects that torchmetrics does not expect.
    theirs_model = SimpleNamespace(
        get_image_features=image_features,
        get_text_features=text_features,
        config=SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77)),
        to=lambda device: theirs_model,
    )
    arrays = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures]
    with torch.no_grad():
        found, _ = theirs._clip_score_update(arrays, PROMPTS, theirs_model, processor)
    (scorer,) = open_scorers(["clipscore"], folder)
    assert scorer.of(pictures, PROMPTS) == pytest.approx(found.clamp(min=0).tolist(), abs=1e-3)


def test_preprocessing_is_clips(pictures: list[Image.Image]) -> None:
    ours = np.stack([np.asarray(cropped(image, 28)) / 255 for image in pictures])
    ours = ((ours - MEAN) / DEVIATION).transpose(0, 3, 1, 2)
    assert np.abs(ours - prepared(pictures).numpy()).max() < 1e-5
    whole = padded(pictures[1], 30)  # 90x60 within a square: black bars above and below
    assert whole.size == (30, 30)
    assert whole.getpixel((15, 2)) == (0, 0, 0)
    assert whole.getpixel((15, 15)) != (0, 0, 0)


def open_clip_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """A transformers CLIP as OpenCLIP stores it, written here by hand."""
    state = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
    found: dict[str, torch.Tensor] = {"logit_scale": state["logit_scale"]}
    plain = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
    for tower, prefix in (("text_model.", ""), ("vision_model.", "visual.")):
        own = {key.removeprefix(tower): value for key, value in state.items() if key.startswith(tower)}
        found |= {prefix + new: own[old] for old, new in plain.items() if old in own}
        for layer in range(2):
            old, new = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(
                    [own[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                )
                found[f"{new}attn.out_proj.{kind}"] = own[f"{old}self_attn.out_proj.{kind}"]
                found[f"{new}ln_1.{kind}"] = own[f"{old}layer_norm1.{kind}"]
                found[f"{new}ln_2.{kind}"] = own[f"{old}layer_norm2.{kind}"]
                found[f"{new}mlp.c_fc.{kind}"] = own[f"{old}mlp.fc1.{kind}"]
                found[f"{new}mlp.c_proj.{kind}"] = own[f"{old}mlp.fc2.{kind}"]
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    return found


def test_hps_is_the_cosine_of_a_clip_in_openclips_layout(
    judges: tuple[nn.Module, Path], pictures: list[Image.Image]
) -> None:
    model, folder = judges
    published_folders.write_tokenizer(folder / "hps")
    (folder / "hps" / "config.json").write_text((folder / "clipscore" / "config.json").read_text())
    torch.save({"state_dict": open_clip_names(model)}, folder / "hps" / "HPS_v2.1_compressed.pt")
    hps, pickscore = open_scorers(["hps", "pickscore"], folder)
    squares = [image.crop((0, 0, 60, 60)) for image in pictures]  # where padding and cropping agree
    scale = float(model.logit_scale.detach().exp())
    expected = [score / scale for score in pickscore.of(squares, PROMPTS)]
    assert hps.of(squares, PROMPTS) == pytest.approx(expected, abs=1e-5)


def head(width: int) -> nn.Sequential:
    """The published head, dropout and all."""
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Linear(width, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.2),
        nn.Linear(8, 6),
        nn.Dropout(0.1),
        nn.Linear(6, 4),
        nn.Linear(4, 1),
    ).eval()


def test_the_aesthetic_score_is_the_head_over_unit_embeddings(
    judges: tuple[nn.Module, Path], pictures: list[Image.Image]
) -> None:
    model, folder = judges
    network = head(12)
    state = {f"layers.{key}": value for key, value in network.state_dict().items()}
    torch.save(state, folder / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=prepared(pictures)).pooler_output
        embeddings = model.visual_projection(pooled)
        expected = network(embeddings / embeddings.norm(dim=1, keepdim=True))[:, 0]
    (scorer,) = open_scorers(["aesthetic"], folder)
    assert scorer.of(pictures, ["", ""]) == pytest.approx(expected.tolist(), abs=1e-5)


def write_image_reward(folder: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A tiny BLIP with a head under ImageReward's names, and its parts as transformers runs them."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    torch.manual_seed(7)
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 1}
    image = BlipVisionModel(
        BlipVisionConfig(hidden_size=20, image_size=28, patch_size=14, layer_norm_eps=1e-6, **sizes)
    ).eval()
    text = BlipTextModel(
        BlipTextConfig(vocab_size=40, hidden_size=16, encoder_hidden_size=20, is_decoder=True, **sizes),
        add_pooling_layer=False,
    ).eval()
    for parameter in (*image.parameters(), *text.parameters()):
        nn.init.normal_(parameter, std=0.2)
    ratings = head(16)
    names = (
        (r"^embeddings\.class_embedding", "cls_token"),
        (r"^embeddings\.position_embedding", "pos_embed"),
        (r"^embeddings\.patch_embedding", "patch_embed.proj"),
        (r"^encoder\.layers", "blocks"),
        (r"self_attn\.projection", "attn.proj"),
        (r"self_attn", "attn"),
        (r"layer_norm", "norm"),
        (r"^post_layernorm", "norm"),
    )
    state: dict[str, torch.Tensor] = {}
    for name, tensor in image.state_dict().items():
        for pattern, old in names:
            name = re.sub(pattern, old, name)
        state[f"blip.visual_encoder.{name}"] = tensor
    state |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    state |= {f"mlp.layers.{name}": tensor for name, tensor in ratings.state_dict().items()}
    state |= {
        "blip.vision_proj.weight": torch.zeros(2),
        "blip.text_encoder.embeddings.position_ids": torch.zeros(1),
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "ImageReward.pt")
    vocabulary = {
        token: n for n, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "circle"])
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.save(str(folder / "tokenizer.json"))
    return image, text, ratings


def test_imagereward_equals_blip_with_its_head(pictures: list[Image.Image], tmp_path: Path) -> None:
    image, text, ratings = write_image_reward(tmp_path / "imagereward")
    (scorer,) = open_scorers(["imagereward"], tmp_path)
    ids = torch.tensor([[1, 4, 5, 6, 2, *[0] * 30], [1, *[3] * 33, 2]])  # padded, and cut at 35
    with torch.no_grad():
        seen = image(pixel_values=prepared(pictures)).last_hidden_state
        mask = (ids != 0).long()
        attended = torch.ones(seen.shape[:2], dtype=torch.long)
        read = text(
            ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=attended
        ).last_hidden_state
        expected = (ratings(read[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD
    found = scorer.of(pictures, ["A red CIRCLE", PROMPTS[1].replace("a very", "one")])
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_what_is_missing_is_told_with_the_way_to_get_it(
    judges: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, folder = judges
    with pytest.raises(CheckpointError, match=r"lacks ImageReward.*hf download THUDM/ImageReward"):
        open_scorers(["clipscore", "imagereward"], folder)
    with pytest.raises(
        CheckpointError, match=r"no folder of weights was given: fetch them with `hf download openai"
    ):
        open_scorers(["clipscore"], None)
    with pytest.raises(CheckpointError, match='did you mean "clipscore"'):
        open_scorers(["clip_score"], folder)
    published_folders.write_tokenizer(tmp_path / "clipscore")
    (tmp_path / "clipscore" / "config.json").write_text((folder / "clipscore" / "config.json").read_text())
    tensors = load_file(folder / "clipscore" / "model.safetensors")
    tensors["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "clipscore" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"visual_projection.weight should be \(12, 20\), and it has \(3, 3\)"
    ):
        open_scorers(["clipscore"], tmp_path)
    assert json.loads((tmp_path / "clipscore" / "config.json").read_text())["model_type"] == "clip"
