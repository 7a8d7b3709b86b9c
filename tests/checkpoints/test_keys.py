"""Every published name and shape fits our networks, and converts back to the very same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manifests import manifest
from safetensors.torch import load_file

from triptych.checkpoints.convert import layout_tensors
from triptych.checkpoints.infer import infer_config
from triptych.checkpoints.keys import converted_shapes, names_from_layout, names_in_layout
from triptych.checkpoints.load import NETWORKS, assign
from triptych.checkpoints.sniff import sniff
from triptych.errors import CheckpointError
from triptych.models.semantic import PREVIEWER, SEMANTIC
from triptych.models.stage_a import DISCRIMINATOR, STAGE_A, Discriminator
from triptych.models.stage_b import STAGE_B
from triptych.models.stage_c import STAGE_C

GOLDEN = Path(__file__).parent.parent / "reference" / "golden"
PUBLISHED = {
    "stage_a": ("official", "stage_a", STAGE_A["full"]),
    "stage_b": ("official", "stage_b", STAGE_B["1.5b"]),
    "stage_b_lite": ("official", "stage_b", STAGE_B["700m"]),
    "stage_c": ("official", "stage_c", STAGE_C["3.6b"]),
    "stage_c_lite": ("official", "stage_c", STAGE_C["1b"]),
    "effnet_encoder": ("official", "semantic", SEMANTIC["full"]),
    "previewer": ("official", "previewer", PREVIEWER["full"]),
    "diffusers_prior": ("diffusers", "stage_c", STAGE_C["3.6b"]),
    "diffusers_prior_lite": ("diffusers", "stage_c", STAGE_C["1b"]),
    "diffusers_decoder": ("diffusers", "stage_b", STAGE_B["1.5b"]),
    "diffusers_decoder_lite": ("diffusers", "stage_b", STAGE_B["700m"]),
    "diffusers_vqgan": ("diffusers", "stage_a", STAGE_A["full"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_recognised_loads_strictly_and_converts_back(name):
    layout, part, config = PUBLISHED[name]
    shapes = manifest(name)
    sniffed = sniff(shapes)
    assert (sniffed.layout, sniffed.part) == (layout, part)
    plan = names_from_layout(shapes, layout, part)
    ours = converted_shapes(shapes, plan)
    assert infer_config(part, ours) == config

    with torch.device("meta"):
        network = NETWORKS[part][0](config)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in ours.items()}
    assign(network, tensors, name)  # strict: nothing missing, nothing left, every shape

    back = layout_tensors(network.state_dict(), part, layout)
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == shapes


def test_the_discriminator_has_the_published_names():
    with torch.device("meta"):
        network = Discriminator(DISCRIMINATOR["full"])
    found = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert found == manifest("stage_a_discriminator")


@pytest.mark.parametrize("part", ["stage_b", "stage_c"])
def test_recorded_weights_in_both_layouts_are_the_same_weights(part):
    def weights(file: str) -> dict[str, torch.Tensor]:
        tensors = load_file(GOLDEN / f"{file}.safetensors")
        return {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}

    def to_ours(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
        plan = names_from_layout(tensors, layout, part)
        return {ours: torch.cat([tensors[name] for name in names]) for ours, names in plan.items()}

    official, diffusers = weights(part), weights(f"diffusers_layout_{part}")
    ours = to_ours(official, "official")
    other = to_ours(diffusers, "diffusers")
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    for layout, expected in (("official", official), ("diffusers", diffusers)):
        back = layout_tensors(ours, part, layout)
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_query_without_value_is_refused():
    names = ["down_blocks.0.2.attention.to_q.weight", "down_blocks.0.2.attention.to_k.weight"]
    with pytest.raises(CheckpointError, match="but not"):
        names_from_layout(names, "diffusers", "stage_c")


def test_one_parameter_under_two_names_is_refused():
    block = "down_blocks.0.2.attention.attn"
    names = [f"{block}.in_proj_weight", f"{block}.in_proj.weight"]
    with pytest.raises(CheckpointError, match="twice"):
        names_from_layout(names, "official", "stage_c")


def test_comfyui_memory_form_differs_from_official_only_in_attention():
    ours = list(converted_shapes(s := manifest("stage_c_lite"), names_from_layout(s, "official", "stage_c")))
    names = names_in_layout(ours, "comfyui", "stage_c")
    split = {name: theirs for name, theirs in names.items() if theirs != (name,)}
    assert len(split) == 64
    assert all(len(theirs) == 3 and ".attention.attn.to_q." in theirs[0] for theirs in split.values())


def test_unknown_layout_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="official, diffusers"):
        names_in_layout([], "gguf", "stage_c")
