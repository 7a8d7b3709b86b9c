"""One file to one network: strict, in any layout, and a sentence of its own for every wrong file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from manifests import manifest, write_header_only
from published_folders import STAGE_A, STAGE_B, STAGE_C, diffusers, networks, official
from safetensors.torch import save_file

from triptych.checkpoints.files import PartInfo, write_part
from triptych.checkpoints.fit import check_addon
from triptych.checkpoints.int8 import narrow
from triptych.checkpoints.load import config_fields, describe_part, load_part, read_part
from triptych.errors import CheckpointError
from triptych.models.stage_b import STAGE_B as STAGE_B_SIZES
from triptych.models.stage_c import STAGE_C as STAGE_C_SIZES
from triptych.models.stage_c import StageC

PARTS = ("stage_a", "stage_b", "stage_c", "previewer")


@pytest.fixture(scope="module")
def made():
    return networks()


@pytest.mark.parametrize("layout", ["official", "diffusers", "triptych"])
@pytest.mark.parametrize("part", PARTS)
def test_the_same_weights_from_every_layout(tmp_path, made, part, layout):
    state = made[part].state_dict()
    path = tmp_path / "x.safetensors"
    if layout == "triptych":
        write_part(path, state, PartInfo(part, config_fields(made[part].config)))
    else:
        save_file(official(state) if layout == "official" else diffusers(part, state), path)
    module, info = load_part(path, part)
    assert module.config == made[part].config
    assert info.part == part
    assert not module.training
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


def test_published_files_get_the_published_settings(tmp_path, made):
    save_file(official(made["stage_c"].state_dict()), tmp_path / "c.safetensors")
    settings = load_part(tmp_path / "c.safetensors")[1].settings
    assert (settings["shift"], settings["steps"], settings["guidance"]) == (2.0, 20, 4.0)
    info = read_part(write_header_only(tmp_path / "lite.safetensors", manifest("stage_c_lite"))).info
    assert info.size == "1b"
    assert "Non-Commercial" in info.licence
    assert info.config == config_fields(STAGE_C_SIZES["1b"])


def test_stage_a_from_diffusers_uses_the_right_scale_not_the_leftover_one(tmp_path, made):
    save_file(diffusers("stage_a", made["stage_a"].state_dict()), tmp_path / "x.safetensors")
    for stored, expected in ((0.3764, 0.43), (0.43, 0.43), (0.5, 0.5)):
        config = {"_class_name": "PaellaVQModel", "scale_factor": stored}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_part(tmp_path / "x.safetensors")[0].config.scale == expected


def test_heads_come_from_the_config_beside_a_diffusers_file(tmp_path):
    config = dataclasses.replace(STAGE_C, heads=(4, 4))
    save_file(diffusers("stage_c", StageC(config).state_dict()), tmp_path / "x.safetensors")
    assert load_part(tmp_path / "x.safetensors")[0].config.heads == (1, 1)
    beside = {"_class_name": "StableCascadeUNet", "num_attention_heads": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert load_part(tmp_path / "x.safetensors")[0].config.heads == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_in_the_file_and_out_of_it(tmp_path, made, dtype):
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in made["stage_b"].state_dict().items()}
    save_file(official(state), tmp_path / "x.safetensors")
    assert next(load_part(tmp_path / "x.safetensors")[0].parameters()).dtype == dtype
    wide, _ = load_part(tmp_path / "x.safetensors", dtype=torch.float32)
    assert torch.equal(wide.clf[1].weight, state["clf.1.weight"].float())


def test_plain_8_bit_floats_are_widened(tmp_path, made):
    state = official(made["stage_c"].state_dict())
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, tmp_path / "x.safetensors")
    assert next(load_part(tmp_path / "x.safetensors")[0].parameters()).dtype == torch.bfloat16


def test_every_mismatch_is_in_one_error(tmp_path, made):
    state = official(made["stage_c"].state_dict())
    state["clf.1.bias"] = torch.zeros(7)
    del state["down_blocks.0.0.depthwise.bias"]
    state["something.else"] = torch.zeros(1)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_part(tmp_path / "x.safetensors")
    message = str(caught.value)
    assert "1 of 94 shapes differ (clf.1.bias is (7,) in the file, (16,) in the model)" in message
    assert "1 of 94 names are missing (down_blocks.0.0.depthwise.bias)" in message
    assert "1 names are unknown (something.else)" in message


def test_nan_is_refused_unless_told_otherwise(tmp_path, made):
    state = official({name: tensor.clone() for name, tensor in made["stage_a"].state_dict().items()})
    state["out_block.0.bias"][0] = float("nan")
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite, first in 'out_block\.0\.bias'"):
        load_part(tmp_path / "x.safetensors")
    load_part(tmp_path / "x.safetensors", finite=False)


@pytest.mark.parametrize("layout", ["official", "diffusers", "triptych", "int8"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_described_as_it_is_read(tmp_path, made, part, layout):
    state = made[part].state_dict()
    path = tmp_path / "x.safetensors"
    if layout in ("triptych", "int8"):
        info = PartInfo(part, config_fields(made[part].config), {"shift": 3.0}, 7, "r", "CC0-1.0")
        write_part(path, narrow(state) if layout == "int8" else state, info)
    else:
        save_file(official(state) if layout == "official" else diffusers(part, state), path)
    described = describe_part(path, part)
    assert described == describe_part(path) == read_part(path, part).info
    assert described.config == config_fields(made[part].config)


PUBLISHED = [
    ("diffusers_prior", STAGE_C_SIZES, "3.6b"),
    ("diffusers_prior_lite", STAGE_C_SIZES, "1b"),
    ("diffusers_decoder", STAGE_B_SIZES, "1.5b"),
    ("stage_b_lite", STAGE_B_SIZES, "700m"),
    ("stage_c", STAGE_C_SIZES, "3.6b"),
]


@pytest.mark.parametrize(("file", "sizes", "size"), PUBLISHED)
def test_published_parts_are_described_without_opening_a_tensor(tmp_path, monkeypatch, file, sizes, size):
    monkeypatch.setattr("triptych.checkpoints.load.read_tensors", None)
    path = write_header_only(tmp_path / "x.safetensors", manifest(file))
    info = describe_part(path, size=size)
    assert (info.config, info.size) == (config_fields(sizes[size]), size)
    assert "Non-Commercial" in info.licence
    assert info.settings["rescale"] == 0.7


def test_describing_the_largest_part_takes_little_memory(tmp_path):
    """Reading its 3.6 billion weights from diffusers' layout would copy 1.6 GB of them."""
    path = write_header_only(tmp_path / "x.safetensors", manifest("diffusers_prior"))
    code = (
        "import resource, sys; from triptych.checkpoints.load import describe_part;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); describe_part(sys.argv[1]); print(peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(ran.stdout) * unit < 64 * 2**20


@pytest.mark.parametrize(
    ("file", "part", "message"),
    [
        ("stage_b", "stage_c", "holds Stage B"),
        ("previewer", "stage_a", "holds the previewer"),
        ({"clf.1.weight": (2, 2), "clip_txt_mapper.weight": (2, 2)}, "stage_c", "make no network of it"),
        ("diffusers_prior_lite", None, "is incomplete"),
    ],
)
def test_describing_a_wrong_file_is_the_same_error(tmp_path, file, part, message):
    shapes = manifest(file) if isinstance(file, str) else dict(file)
    shapes.pop("down_blocks.0.2.attention.to_v.weight", None)
    path = write_header_only(tmp_path / "x.safetensors", shapes)
    for read in (read_part, describe_part):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path, part)
        assert str(path) in str(caught.value)


def some(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: (2, 2) for name in names}


WRONG = [
    ("stage_b", "stage_c", None, "holds Stage B (the decoder) where Stage C (the prior) is wanted"),
    ("diffusers_decoder", "stage_c", None, "Give this file with --stage-b"),
    ("stage_c_lite", "stage_b", None, "holds Stage C (the prior) where Stage B (the decoder) is wanted"),
    ("stage_a", "stage_c", None, "holds Stage A where Stage C (the prior) is wanted. Give it with --stage-a"),
    ("previewer", "stage_a", None, "holds the previewer where Stage A is wanted"),
    ("effnet_encoder", "stage_a", None, "holds the semantic encoder where Stage A is wanted"),
    ("controlnet_canny", "stage_c", None, "is a ControlNet, which steers a Stage C"),
    ("controlnet_super_resolution", "stage_b", None, "is a ControlNet"),
    ("stage_c_lora_rank4_attn", "stage_c", None, "is a LoRA, which changes a Stage C"),
    ("wuerstchen_v2_prior", "stage_c", None, "holds the prior of Würstchen v2"),
    ("wuerstchen_v2_decoder", "stage_b", None, "holds the decoder of Würstchen v2"),
    ("diffusers_wuerstchen_v2_prior", "stage_c", None, "holds the prior of Würstchen v2"),
    ("diffusers_wuerstchen_v2_decoder", None, None, "holds the decoder of Würstchen v2"),
    ("stage_a_discriminator", None, None, "holds Stage A's discriminator"),
    ("stage_c", "stage_c", "1b", 'is not "1b"; it looks like "3.6b": pass --stage-c 3.6b'),
    ("stage_b_lite", "stage_b", "1.5b", 'is not "1.5b"; it looks like "700m": pass --stage-b 700m'),
    (some("text_model.encoder.layers.0.mlp.fc1.weight"), "stage_c", None, "Give it with --text-encoder"),
    (some("vision_model.post_layernorm.weight"), "stage_a", None, "holds an image encoder where Stage A"),
    (some("lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight"), "stage_b", None, "is a LoRA"),
    (some("unet.down_blocks.0.2.attention.to_q.lora_A.weight"), "stage_c", None, "give it with --lora"),
    (some("clip_g"), "stage_c", None, "holds a learned token"),
    (some("scaled_fp8", "clf.1.weight"), None, None, "8-bit floats"),
    (some("conv_in.weight", "conv_out.weight"), "stage_c", None, "not of Stable Cascade"),
    (some("clf.1.weight", "clip_txt_mapper.weight"), "stage_c", None, "make no network of it"),
]


@pytest.mark.parametrize(("file", "part", "size", "sentence"), WRONG)
def test_every_wrong_file_has_its_sentence(tmp_path, file, part, size, sentence):
    shapes = manifest(file) if isinstance(file, str) else file
    path = write_header_only(tmp_path / "x.safetensors", shapes)
    with pytest.raises(CheckpointError) as caught:
        load_part(path, part, size=size, finite=False)
    message = str(caught.value)
    assert sentence in message
    assert str(path) in message
    assert "\n" not in message


ADDONS = [
    ("controlnet_canny", 1536, "1b", 'made for the Stage C "3.6b", and the model\'s is "1b"'),
    ("stage_c_lora_rank4_attn", 1536, "1b", "use it with --stage-c 3.6b"),
    ("stage_c_lite_lora_rank4_attn", 2048, "3.6b", 'made for the Stage C "1b"'),
    ("stage_a", 2048, "3.6b", "a LoRA or a ControlNet was expected"),
]


@pytest.mark.parametrize(("file", "width", "size", "sentence"), ADDONS)
def test_addons_of_another_size_are_refused(tmp_path, file, width, size, sentence):
    path = write_header_only(tmp_path / "x.safetensors", manifest(file))
    with pytest.raises(CheckpointError) as caught:
        check_addon(path, width, size)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("file", ["controlnet_canny", "stage_c_lora_rank4_attn"])
def test_addons_of_the_right_size_pass(tmp_path, file):
    path = write_header_only(tmp_path / "x.safetensors", manifest(file))
    assert check_addon(path, 2048, "3.6b").size == "3.6b"


def test_configs_of_the_tiny_folders_are_what_shapes_say(made):
    assert made["stage_a"].config == STAGE_A
    assert made["stage_b"].config == STAGE_B
