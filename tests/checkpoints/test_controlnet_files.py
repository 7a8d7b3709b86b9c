"""Official ControlNet files load strictly; what they do not hold is known; they convert both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manifests import manifest, write_header_only

from triptych.checkpoints.catalog import controlnet_files, find_controlnet, find_model
from triptych.checkpoints.convert import convert_file, convert_model
from triptych.checkpoints.files import PartInfo, read_tensors, write_part, write_tensors
from triptych.checkpoints.load import NETWORKS, build_network, config_fields, describe_part, load_part
from triptych.errors import CheckpointError
from triptych.models.controlnet import CONTROLNET, PUBLISHED_CONTROLNETS, ControlNet, ControlNetConfig
from triptych.models.semantic import SEMANTIC, SemanticEncoder

FILES = {
    "controlnet_canny": ("canny", (0, 4, 8, 12, 51, 55, 59, 63)),
    "controlnet_inpainting": ("inpainting", (0, 4, 8, 12, 51, 55, 59, 63)),
    "controlnet_super_resolution": ("super_resolution", (0, 4, 8, 12, 51, 55, 59, 63)),
    "controlnet_identity": ("identity", tuple(range(64))),
}
SMALL = replace(CONTROLNET["tiny"], blocks=(0, 3))


def write_controlnet(path: Path, hint: str = "canny", config: ControlNetConfig = SMALL) -> Path:
    network = ControlNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    info = PartInfo("controlnet", config=config_fields(config), settings={"hint": hint}, step=9)
    write_part(path, network.state_dict(), info)
    return path


@pytest.mark.parametrize(("file", "hint", "blocks"), [(f, *said) for f, said in FILES.items()])
def test_published_files_fit_their_network_and_get_hint_blocks_and_licence(tmp_path, file, hint, blocks):
    info = describe_part(write_header_only(tmp_path / "x.safetensors", manifest(file), "F32"), "controlnet")
    assert info.settings == {"hint": hint}
    assert tuple(info.config["blocks"]) == blocks
    assert info.size == hint
    assert "Non-Commercial" in info.licence
    network = build_network("controlnet", PUBLISHED_CONTROLNETS[hint], "x")
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == manifest(file)


@pytest.mark.parametrize(("file", "part"), [("saliency_micro_resnet", "saliency"), ("pidinet", "pidinet")])
def test_networks_of_hints_have_the_published_names_and_shapes(tmp_path, file, part):
    info = describe_part(write_header_only(tmp_path / "x.safetensors", manifest(file)), part)
    network, config = NETWORKS[part]
    with torch.device("meta"):
        built = network(config(**info.config))
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == manifest(file)


@pytest.mark.parametrize("layout", ["official", "comfyui"])
def test_a_file_converts_there_and_back_without_loss(tmp_path, layout):
    path = write_controlnet(tmp_path / "mine.safetensors")
    convert_file(path, tmp_path / "theirs.safetensors", layout)
    convert_file(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "official")
    before, after = load_part(path)[1], load_part(tmp_path / "back.safetensors", "controlnet")[1]
    assert before == after
    first, last = read_tensors(path), read_tensors(tmp_path / "back.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert first.keys() == last.keys()


def test_files_of_others_may_lack_metadata_and_ours_keep_their_blocks(tmp_path):
    path = write_controlnet(tmp_path / "mine.safetensors")
    assert load_part(path)[0].config.blocks == (0, 3)
    write_tensors(tmp_path / "bare.safetensors", read_tensors(path))
    network, info = load_part(tmp_path / "bare.safetensors", "controlnet")
    assert network.config.blocks == (0, 1)  # two projections: all that can be told
    assert info.settings["hint"] == "canny"
    assert network.config.stages == SMALL.stages


def test_diffusers_has_no_form_of_it(tmp_path):
    path = write_controlnet(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match="diffusers has no form of controlnet"):
        convert_file(path, tmp_path / "theirs", "diffusers")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bottleneck": "vgg"}, "unknown bottleneck"),
        ({"blocks": [3, 0]}, "not a rising list"),
        ({"blocks": list(range(999))}, "more than there are tensors"),
        ({"residual_blocks": 10**9}, "more layers than there are tensors"),
    ],
)
def test_a_senseless_configuration_is_refused(tmp_path, change, said):
    config = config_fields(SMALL) | change
    network = ControlNet(SMALL)
    write_part(tmp_path / "x.safetensors", network.state_dict(), PartInfo("controlnet", config=config))
    with pytest.raises(CheckpointError, match=said):
        load_part(tmp_path / "x.safetensors")


def test_a_model_knows_the_controlnets_beside_it(tiny_cascade, tmp_path):
    for part in tiny_cascade.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "controlnet").mkdir()
    files = find_model(tmp_path)
    assert controlnet_files(files) == {}
    canny = write_controlnet(tmp_path / "a.safetensors")
    other = write_controlnet(tmp_path / "controlnet" / "b.safetensors", "palette")
    assert controlnet_files(files) == {"canny": canny, "palette": other}
    assert find_controlnet(files, "palette") == other
    with pytest.raises(CheckpointError, match=r'has no ControlNet for "inpainting"; it has canny, palette'):
        find_controlnet(files, "inpainting")
    assert find_model(tmp_path).stage_c.name == "stage_c.safetensors"  # they do not stand in its way
    written = convert_model(files, tmp_path / "out", "official")
    assert tmp_path / "out" / "controlnet" / "palette.safetensors" in written


def test_an_encoder_begins_as_the_pictures_encoder_with_a_stem_for_its_channels():
    semantic = SemanticEncoder(SEMANTIC["tiny"])
    weights = semantic.state_dict()
    rgb = weights["backbone.0.0.weight"]
    for channels in (1, 3, 4):
        network = ControlNet(replace(CONTROLNET["tiny"], channels=channels))
        assert network.start_from(weights)
        stem = network.state_dict()["backbone.0.0.weight"]
        shared = min(3, channels)
        assert torch.equal(stem[:, :shared], rgb[:, :shared])
        assert not stem[:, shared:].any()
        assert torch.equal(network.state_dict()["backbone.6.0.weight"], weights["backbone.6.0.weight"])
    assert not ControlNet(replace(CONTROLNET["tiny"], channels=16, bottleneck="large")).start_from(weights)


def test_a_fresh_network_adds_nothing():
    network = ControlNet(CONTROLNET["tiny"])
    residuals = network(torch.rand(2, 1, 64, 96))
    assert [tuple(residual.shape) for residual in residuals] == [(2, 32, 2, 3)] * 4
    assert not any(residual.any() for residual in residuals)
