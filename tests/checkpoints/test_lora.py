"""LoRA files of every maker change the same weights by the same numbers; others are refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from manifests import FOLDER, manifest
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.checkpoints.files import PartInfo
from triptych.checkpoints.lora import Lora, read_lora, with_tokens
from triptych.checkpoints.lora_keys import official_targets
from triptych.checkpoints.lora_write import LAYOUTS, write_lora
from triptych.errors import CheckpointError
from triptych.models.lora import Change, extract, merge, merged, put_back, split_thirds
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC

BLOCK = "down_blocks.0.2.attention.attn"
WIDTH = 32


@pytest.fixture(scope="module")
def network() -> StageC:
    torch.manual_seed(0)
    return StageC(STAGE_C["tiny"]).eval()


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture
def shapes(network: StageC) -> dict[str, dict[str, tuple[int, ...]]]:
    return {"stage_c": shapes_of(network), "stage_b": shapes_of(StageB(STAGE_B["tiny"]))}


def attention_lora(network: StageC, rank: int = 3) -> Lora:
    """A random LoRA, scale 0.5, on every attention matrix, with a token of two vectors."""
    torch.manual_seed(1)
    changes = []
    for target in official_targets(network.state_dict()):
        rows, columns = network.get_submodule(target).weight.shape  # type: ignore[union-attr, misc]
        factors = {"down": torch.randn(rank, columns), "up": torch.randn(rows, rank)}
        changes.append(Change(target, "lora", factors, 0.5))
    info = PartInfo("lora", licence="some licence", notice="a notice")
    return Lora({"stage_c": changes}, {"[dog]": torch.randn(2, 384)}, info=info)


def deltas(lora: Lora, network: StageC) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for change in lora.changes["stage_c"]:
        weight = network.get_parameter(f"{change.target}.weight").detach()
        found[change.target] = found.get(change.target, 0) + change.difference(weight)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_change_back(
    layout: str, network: StageC, shapes, tmp_path: Path
) -> None:
    lora = attention_lora(network)
    write_lora(tmp_path / "x.safetensors", lora, layout)
    again = read_lora(tmp_path / "x.safetensors", shapes)
    expected, got = deltas(lora, network), deltas(again, network)
    assert expected.keys() == got.keys()
    for target in expected:
        torch.testing.assert_close(got[target], expected[target], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.tokens["[dog]"], lora.tokens["[dog]"])
    assert (again.info.licence, again.info.notice) == ("some licence", "a notice")


def foreign_file(maker: str, down: Tensor, up: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same change of the packed matrix's query rows, alpha 2 rank 4, as different makers write it."""
    half = torch.tensor(2.0)
    if maker in ("kohya", "onetrainer legacy", "onetrainer kohya"):
        prefix = "lora_prior_unet_" if maker == "onetrainer legacy" else "lora_unet_"
        last = "in_proj_0" if maker == "onetrainer kohya" else "to_q"
        name = f"{prefix}down_blocks_0_2_attention_attn_{last}"
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": half}, {}
    if maker in ("onetrainer original", "comfyui"):
        prefix = "diffusion_model." if maker == "comfyui" else ""
        last = "to_q" if maker == "comfyui" else "in_proj.0"
        name = f"{prefix}{BLOCK}.{last}"
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": half}, {}
    name = "down_blocks.0.2.attention.to_q"
    if maker == "diffusers script":  # alpha = rank
        return {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up / 2}, {}
    if maker == "onetrainer diffusers":
        return {f"prior.{name}.lora_A.weight": down, f"prior.{name}.lora_B.weight": up / 2}, {}
    named = {f"base_model.model.{name}.lora_A.default.weight": down,
             f"base_model.model.{name}.lora_B.default.weight": up}  # fmt: skip
    return named, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 4})}


@pytest.mark.parametrize(
    "maker",
    ["kohya", "onetrainer legacy", "onetrainer kohya", "onetrainer original", "onetrainer diffusers",
     "comfyui", "diffusers script", "peft"],
)  # fmt: skip
def test_files_of_every_maker_mean_the_same(maker: str, network: StageC, shapes, tmp_path: Path) -> None:
    down, up = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    tensors, metadata = foreign_file(maker, down, up)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    (change,) = read_lora(tmp_path / "x.safetensors", shapes).changes["stage_c"]
    expected = torch.cat([0.5 * up @ down, torch.zeros(2 * WIDTH, WIDTH)])
    weight = network.get_parameter(f"{BLOCK}.in_proj.weight").detach()
    torch.testing.assert_close(change.difference(weight), expected, rtol=1e-5, atol=1e-5)


def test_kohya_changes_of_convolutions_and_of_stage_b(network: StageC, shapes, tmp_path: Path) -> None:
    down, up = torch.randn(2, 16, 1, 1), torch.randn(WIDTH, 2, 1, 1)
    tensors = {"lora_unet_embedding_1.lora_down.weight": down, "lora_unet_embedding_1.lora_up.weight": up,
               "lora_unet_embedding_1.alpha": torch.tensor(1.0)}  # fmt: skip
    rows, columns = shapes["stage_b"]["clip_mapper.weight"]
    tensors |= {"decoder.clip_txt_pooled_mapper.lora_A.weight": torch.randn(1, columns),
                "decoder.clip_txt_pooled_mapper.lora_B.weight": torch.randn(rows, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", shapes)
    (change,) = lora.changes["stage_c"]
    added = change.difference(network.get_parameter("embedding.1.weight").detach())
    torch.testing.assert_close(added[..., 0, 0], 0.5 * up[..., 0, 0] @ down[..., 0, 0])
    assert lora.changes["stage_b"][0].target == "clip_mapper"


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "loha", "lokr"])
def test_changes_equal_those_of_peft(kind: str, tmp_path: Path, shapes, network: StageC) -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential()
    layer.add_module("probe", torch.nn.Linear(24, 36, bias=False))
    if kind in ("loha", "lokr"):
        config = (peft.LoHaConfig if kind == "loha" else peft.LoKrConfig)(
            r=4, alpha=2, target_modules=["probe"]
        )
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=2, use_dora=kind == "dora", use_rslora=kind == "rslora", target_modules=["probe"]
        )
    weight = layer.probe.weight.detach().clone()  # type: ignore[union-attr]
    model = peft.get_peft_model(layer, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tensors = {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    wanted = model.merge_and_unload().probe.weight.detach()
    own = {"stage_c": {"probe.weight": (36, 24)}}
    (change,) = read_lora(tmp_path / "adapter_model.safetensors", own).changes["stage_c"]
    torch.testing.assert_close(merged(weight, [(change, 1.0)]), wanted, rtol=1e-4, atol=1e-4)
    target = f"{BLOCK}.in_proj"
    for piece in split_thirds(
        Change(target, change.kind, change.factors, change.scale, None, change.magnitude)
    ):
        assert piece.third in (None, 0, 1, 2)


def test_thirds_of_a_change_are_the_whole(network: StageC) -> None:
    weight = network.get_parameter(f"{BLOCK}.in_proj.weight").detach()
    factors = {"down": torch.randn(2, WIDTH), "up": torch.randn(3 * WIDTH, 2)}
    whole = Change(f"{BLOCK}.in_proj", "lora", factors, 0.5, magnitude=torch.rand(3 * WIDTH, 1))
    thirds = split_thirds(whole)
    assert [change.third for change in thirds] == [0, 1, 2]
    torch.testing.assert_close(sum(c.difference(weight) for c in thirds), whole.difference(weight))


def test_merging_stacks_scales_and_comes_out_again_bit_for_bit(network: StageC) -> None:
    first, second = attention_lora(network), attention_lora(network, rank=1)
    name = f"{BLOCK}.out_proj.weight"
    old = network.get_parameter(name).detach().clone()
    both = [(c, 0.5) for c in first.changes["stage_c"]] + [(c, -1.0) for c in second.changes["stage_c"]]
    before = merge(network, both)
    target = name.removesuffix(".weight")
    expected = old + 0.5 * deltas(first, network)[target] - deltas(second, network)[target]
    torch.testing.assert_close(network.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-5)
    put_back(network, before)
    assert torch.equal(network.get_parameter(name).detach(), old)
    assert merge(network, [(change, 0.0) for change in first.changes["stage_c"]]) == {}


def test_extracting_a_merged_lora_finds_it_again(network: StageC) -> None:
    before = network.get_parameter(f"{BLOCK}.in_proj.weight").detach()
    change = Change("x", "lora", {"down": torch.randn(3, WIDTH), "up": torch.randn(3 * WIDTH, 3)}, 0.1)
    after = merged(before, [(change, 1.0)])
    found = extract("x", before, after, rank=3)
    assert found is not None
    torch.testing.assert_close(found.difference(before), after - before, rtol=1e-3, atol=1e-5)
    assert extract("x", before, before, rank=3) is None


@pytest.mark.parametrize("size", ["stage_c", "stage_c_lite"])
def test_official_numbers_name_the_manifests_targets(size: str) -> None:
    ours = [name.replace("in_proj_weight", "in_proj.weight") for name in manifest(size)]
    listed = json.loads((FOLDER / f"{size}_lora_rank4_attn.json").read_text())["targets"]
    listed = list(listed.values()) if isinstance(listed, dict) else listed
    expected = [name.replace("in_proj_weight", "in_proj").removesuffix(".weight") for name in listed]
    assert official_targets(ours) == expected


def test_official_tokens_get_their_names_and_starts(network: StageC, shapes, tmp_path: Path) -> None:
    write_lora(tmp_path / "x.safetensors", attention_lora(network), "official")
    tensors = load_file(tmp_path / "x.safetensors")
    tensors["embeddings.indices"] = torch.tensor([10, 11])
    save_file(tensors, tmp_path / "bare.safetensors")
    lora = read_lora(tmp_path / "bare.safetensors", shapes)
    assert lora.offsets is not None
    start = torch.randn(384)
    named = with_tokens(lora, torch.zeros(10, 384), {"[a]": start, "[b]": None})
    torch.testing.assert_close(named.tokens["[a]"][0], start + tensors["embeddings.embeddings"][0])
    torch.testing.assert_close(named.tokens["[b]"][0], tensors["embeddings.embeddings"][1])
    with pytest.raises(CheckpointError, match="2 new tokens and 1 names"):
        with_tokens(lora, torch.zeros(10, 384), {"[a]": None})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_down_blocks_0_2_attention_attn_out_proj.lora_down.weight": (4, 2048),
          "lora_unet_down_blocks_0_2_attention_attn_out_proj.lora_up.weight": (2048, 4)},
         'made for the Stage C "?of width 2048|made for the Stage C "3.6b"'),
        ({"lora_unet_down_blocks_0_44_kv_mapper_1.lora_down.weight": (4, 32),
          "lora_unet_down_blocks_0_44_kv_mapper_1.lora_up.weight": (32, 4)}, "not in this model"),
        ({"lora_unet_clf_1.lora_down.weight": (4, 1536), "lora_unet_clf_1.lora_up.weight": (16, 4)},
         "use it with --stage-c 1b"),
        ({"lora_unet_clf_1.oft_R.weight": (4, 32, 32)}, "OFT"),
        ({"lora_unet_clf_1.lora_down.weight": (4, 32)}, "is incomplete"),
    ],
    ids=["another width", "another depth", "another shape", "rotation", "half"],
)  # fmt: skip
def test_what_does_not_fit_gets_its_sentence(tensors, said: str, shapes, tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said):
        read_lora(tmp_path / "x.safetensors", shapes)


def test_the_official_layout_refuses_what_it_cannot_hold(network: StageC, tmp_path: Path) -> None:
    factors = {"down": torch.randn(2, 32), "up": torch.randn(16, 2)}
    lora = Lora({"stage_c": [Change("clf.1", "lora", factors)]})
    with pytest.raises(CheckpointError, match="attention only"):
        write_lora(tmp_path / "x.safetensors", lora, "official")
    with pytest.raises(CheckpointError, match='did you mean "kohya"'):
        write_lora(tmp_path / "x.safetensors", lora, "koya")
