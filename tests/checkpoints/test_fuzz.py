"""Whatever a file holds, reading it ends in tensors or in a CheckpointError, with bounded memory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folders import networks, official
from safetensors.torch import save_file

from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import ITEM_BYTES, PartInfo, part_info
from triptych.checkpoints.load import load_part
from triptych.errors import CheckpointError

MANY = settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small Stage A file with our metadata."""
    path = tmp_path_factory.mktemp("real") / "stage_a.safetensors"
    network = networks()["stage_a"]
    info = PartInfo("stage_a", {"width": 16, "bottleneck_blocks": 1, "codes": 32})
    save_file(official(network.state_dict()), path, info.to_metadata())
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def attempt(path: Path, content: bytes) -> None:
    """Everything that reads a file: header, recognition, metadata, loading."""
    path.write_bytes(content)
    for read in (lambda: part_info(identify(path)[0]), lambda: load_part(path)):
        with contextlib.suppress(CheckpointError):
            read()


@MANY
@given(st.binary(max_size=400))
def test_random_bytes(path, content):
    attempt(path, content)


@MANY
@given(st.binary(max_size=300), st.binary(max_size=50))
def test_random_headers_with_a_true_length(path, header, rest):
    attempt(path, len(header).to_bytes(8, "little") + header + rest)


@MANY
@given(st.data())
def test_flipped_bits_and_cuts_of_a_real_file(path, real, data):
    content = bytearray(real)
    header_end = 8 + int.from_bytes(real[:8], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        # Most flips go to the header, where they can do harm.
        end = data.draw(st.sampled_from([header_end, header_end, len(content)]))
        content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    attempt(path, bytes(content))


NAMES = st.sampled_from(
    [
        "clf.1.weight",
        "clip_txt_mapper.weight",
        "clip_txt_pooled_mapper.weight",
        "clip_img_mapper.weight",
        "effnet_mapper.0.weight",
        "embedding.1.weight",
        "clip_mapper.weight",
        "down_blocks.0.0.depthwise.weight",
        "down_blocks.0.1.mapper.weight",
        "down_blocks.0.2.attention.to_q.weight",
        "down_blocks.0.2.attention.to_k.weight",
        "down_blocks.0.2.attention.to_v.weight",
        "down_blocks.x.0.depthwise.weight",
        "up_blocks.0.0.depthwise.weight",
        "up_blocks.9999999.0.depthwise.weight",
        "vquantizer.codebook.weight",
        "up_blocks.0.0.weight",
        "backbone.0.0.weight",
        "mapper.0.weight",
        "blocks.0.weight",
        "blocks.11.weight",
        "blocks.24.weight",
        "weights.0.lora_up",
        "model.diffusion_model.clf.1.weight",
        "model.diffusion_model.clip_txt_mapper.weight",
        "projections.0.2.weight",
        "text_model.embeddings.token_embedding.weight",
        "x.scale",
    ]
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@MANY
@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(ITEM_BYTES))), max_size=14), st.booleans()
)
def test_plausible_names_with_random_shapes(path, entries, carries_metadata):
    header: dict[str, object] = {}
    position = 0
    for name, (shape, dtype) in entries.items():
        size = ITEM_BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    if carries_metadata:
        config = {"widths": [8], "unknown": 1} if len(entries) % 2 else {"width": 10**9}
        header["__metadata__"] = PartInfo("stage_a" if position % 2 else "stage_c", config).to_metadata()
    text = json.dumps(header).encode()
    attempt(path, len(text).to_bytes(8, "little") + text + bytes(position))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = [
    "widths",
    "heads",
    "patterns",
    "down_blocks",
    "kernel",
    "time_size",
    "cond_width",
    "patch",
    "scale",
    "width",
]


@MANY
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.sampled_from(["stage_a", "stage_b", "stage_c"]),
)
def test_any_stored_configuration(path, real, config, part):
    header_end = 8 + int.from_bytes(real[:8], "little")
    header = json.loads(real[8:header_end])
    header["__metadata__"] = PartInfo(part, config).to_metadata()
    text = json.dumps(header).encode()
    attempt(path, len(text).to_bytes(8, "little") + text + real[header_end:])
