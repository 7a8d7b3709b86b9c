"""LoRAs at generation: worn, stacked, scaled and taken off without loading again; learned tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_cascade import write_tiny_cascade

from triptych.checkpoints.headers import PartInfo
from triptych.checkpoints.load import load_part
from triptych.checkpoints.lora import GATE, Lora
from triptych.checkpoints.lora_keys import official_targets
from triptych.checkpoints.lora_write import write_lora
from triptych.errors import CheckpointError, RequestError
from triptych.models.lora import Change, merge
from triptych.pipelines.adapters import split_scale
from triptych.pipelines.cascade import Cascade


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("tiny"))


def lora_for(
    path: Path, model: Path, seed: int, tokens: dict[str, torch.Tensor] | None = None, gate: bool = False
) -> str:
    """A random LoRA for the attention of the model's Stage C, and one matrix of its Stage B."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, list[Change]] = {}
    for part in ("stage_c", "stage_b"):
        network, _ = load_part(model / f"{part}.safetensors", part)
        targets = official_targets(network.state_dict()) if part == "stage_c" else ["clip_mapper"]
        for target in targets:
            rows, columns = network.get_parameter(f"{target}.weight").shape
            factors = {
                "up": 0.3 * torch.randn(rows, 2, generator=generator),
                "down": torch.randn(2, columns, generator=generator),
            }
            changes.setdefault(part, []).append(Change(target, "lora", factors))
    info = PartInfo("lora", settings={GATE: gate})
    write_lora(path, Lora(changes, tokens or {}, info=info))
    return str(path)


def draw(cascade: Cascade, *lora: str, prompt: str = "a red star") -> torch.Tensor:
    result = cascade.generate(prompt, seed=3, lora=lora)
    return torch.cat([result.latents_c.flatten(), result.latents_b.flatten()])


def test_a_scale_may_follow_the_file() -> None:
    assert split_scale("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_scale("a.safetensors:-1e-1") == (Path("a.safetensors"), -0.1)
    assert split_scale("b:c.safetensors") == (Path("b:c.safetensors"), 1.0)


@pytest.mark.parametrize("low_memory", [False, True], ids=["resident", "streamed"])
def test_worn_equals_merged_and_taken_off_equals_never_worn(
    folder: Path, tmp_path: Path, low_memory: bool
) -> None:
    lora = lora_for(tmp_path / "lora.safetensors", folder, seed=1)
    cascade = Cascade.load(folder, dtype="float32", low_memory=low_memory)
    plain = draw(cascade)
    worn = draw(cascade, lora)
    half = draw(cascade, f"{lora}:0.5")
    assert not torch.allclose(plain, worn, atol=1e-3)
    assert not torch.allclose(half, worn, atol=1e-3)
    assert torch.equal(draw(cascade), plain)
    assert torch.equal(draw(cascade, f"{lora}:0"), plain)
    assert torch.equal(draw(Cascade.load(folder, dtype="float32"), lora), worn)
    torch.testing.assert_close(draw(cascade, f"{lora}:0.25", f"{lora}:0.25"), half, rtol=1e-3, atol=1e-4)


def test_changing_the_scale_loads_nothing_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    lora = lora_for(tmp_path / "lora.safetensors", folder, seed=1)
    cascade = Cascade.load(folder, dtype="float32")
    draw(cascade, lora)
    monkeypatch.setattr("triptych.pipelines.parts.load_part", None)
    monkeypatch.setattr("triptych.pipelines.adapters.read_lora", None)
    monkeypatch.setattr("triptych.pipelines.parts.load_text_encoder", None)
    draw(cascade, f"{lora}:0.5")
    draw(cascade)


def test_a_lora_is_merged_before_float16_is_made_safe(folder: Path, tmp_path: Path) -> None:
    lora = lora_for(tmp_path / "lora.safetensors", folder, seed=1)
    wide = draw(Cascade.load(folder, dtype="float32"), lora)
    half = Cascade.load(folder, dtype="float16")
    plain = draw(half)
    torch.testing.assert_close(draw(half, lora), wide, rtol=0.05, atol=0.1)
    assert torch.equal(draw(half), plain)


def test_a_learned_token_is_read_where_it_stands(folder: Path, tmp_path: Path) -> None:
    cascade = Cascade.load(folder, dtype="float32")
    with cascade.parts.turn("text_encoder") as encoder:
        apple, star = encoder.token_vectors("apple"), encoder.token_vectors("star")
    lora = lora_for(tmp_path / "lora.safetensors", folder, 1, {"[dog]": torch.cat([apple, star])})
    silent = f"{lora}:0"  # the strength is that of the weights; tokens are known either way
    assert torch.equal(draw(cascade, silent, prompt="a red [dog]"), draw(cascade, prompt="a red apple star"))
    unknown = draw(cascade, prompt="a red [dog]")
    assert not torch.equal(unknown, draw(cascade, silent, prompt="a red [dog]"))


def test_files_that_do_not_belong_are_refused_before_any_weight_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    cascade = Cascade.load(folder)
    wide = lora_for(tmp_path / "wide.safetensors", folder, 1, {"[dog]": torch.zeros(1, 1280)})
    one = lora_for(tmp_path / "one.safetensors", folder, 1, {"[dog]": torch.zeros(1, 384)})
    two = lora_for(tmp_path / "two.safetensors", folder, 1, {"[dog]": torch.ones(1, 384)})
    for files, error, said in (
        ([str(tmp_path / "none.safetensors")], CheckpointError, "There is no LoRA file"),
        ([str(folder / "stage_b.safetensors")], CheckpointError, "a LoRA was expected"),
        ([wide], CheckpointError, "made for another model"),
        ([one, two], RequestError, "different things called"),
    ):
        with pytest.raises(error, match=said):
            cascade.stream("a star", lora=files)
    assert not cascade.parts._loaded


def test_a_merged_network_equals_a_worn_one(folder: Path, tmp_path: Path) -> None:
    network, _ = load_part(folder / "stage_c.safetensors", "stage_c")
    target = official_targets(network.state_dict())[0]
    old = network.get_parameter(f"{target}.weight").detach().clone()
    rows, columns = old.shape
    change = Change(target, "lora", {"up": torch.ones(rows, 1), "down": torch.ones(1, columns)}, 0.5)
    merge(network, [(change, 2.0)])
    torch.testing.assert_close(network.get_parameter(f"{target}.weight").detach(), old + 1)


@pytest.mark.parametrize("low_memory", [False, True], ids=["resident", "streamed"])
def test_a_gated_lora_acts_on_prompts_with_its_token_only(
    folder: Path, tmp_path: Path, low_memory: bool
) -> None:
    token = {"[dog]": torch.randn(1, 384, generator=torch.Generator().manual_seed(0))}
    gated = lora_for(tmp_path / "gated.safetensors", folder, 1, token, gate=True)
    always = lora_for(tmp_path / "always.safetensors", folder, 1, token)
    other = lora_for(tmp_path / "other.safetensors", folder, 2)
    cascade = Cascade.load(folder, dtype="float32", low_memory=low_memory)
    assert torch.equal(draw(cascade, gated), draw(cascade))
    told = "a red [dog]"
    assert torch.equal(draw(cascade, gated, prompt=told), draw(cascade, always, prompt=told))
    assert torch.equal(draw(cascade, gated, other), draw(cascade, other))
    mixed = cascade.generate([told, "a red star", told], seeds=[3, 3, 4], lora=(gated,))
    assert torch.equal(
        mixed.latents_c[1].flatten(), cascade.generate("a red star", seed=3).latents_c.flatten()
    )
    alone = cascade.generate(told, seed=3, lora=(gated,))
    torch.testing.assert_close(mixed.latents_c[0], alone.latents_c[0])
