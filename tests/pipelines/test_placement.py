"""Where weights live changes memory, never numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from triptych.checkpoints.headers import read_header
from triptych.checkpoints.load import load_part
from triptych.errors import CapacityError, RequestError
from triptych.pipelines import capacity, placement
from triptych.pipelines.needs import Need, measure
from triptych.pipelines.placement import Placement, blocks_of, choose_device, choose_dtype, place

CPU = torch.device("cpu")


def answer(folder: Path, weights: placement.Weights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    network, _ = load_part(folder / "stage_b.safetensors", "stage_b")
    place(network, Placement(CPU, dtype, weights))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return network(x, torch.tensor([0.5]), x.new_ones(1, 16, 2, 2), x.new_ones(1, 384))


@pytest.mark.parametrize("weights", ["narrow", "streamed"])
def test_bfloat16_weights_give_the_numbers_of_float32_ones(
    narrow_cascade: Path, weights: placement.Weights
) -> None:
    assert torch.equal(answer(narrow_cascade, weights), answer(narrow_cascade, "resident"))


def test_int8_weights_are_close_and_a_quarter_of_the_size(narrow_cascade: Path) -> None:
    network, _ = load_part(narrow_cascade / "stage_b.safetensors", "stage_b")
    place(network, Placement(CPU, torch.float32, "int8"))
    matrices = [p for block in blocks_of(network) for p in block.parameters() if p.ndim == 2]
    assert matrices
    assert {p.dtype for p in matrices} == {torch.int8}
    exact, rounded = answer(narrow_cascade, "resident"), answer(narrow_cascade, "int8")
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("weights", ["narrow", "streamed"])
def test_blocks_are_wide_only_while_they_run(narrow_cascade: Path, weights: placement.Weights) -> None:
    network, _ = load_part(narrow_cascade / "stage_c.safetensors", "stage_c")
    place(network, Placement(CPU, torch.float32, weights))
    blocks = list(blocks_of(network))
    wide: list[int] = []

    def look(*_: object) -> None:
        wide.append(sum(next(b.parameters()).dtype == torch.float32 for b in blocks if list(b.parameters())))

    for block in blocks:
        block.register_forward_hook(look)
    hidden = torch.zeros(1, 8, 384)
    with torch.no_grad():
        network(torch.zeros(1, 16, 2, 2), torch.zeros(1), hidden, hidden[:, 0])
    assert wide
    assert max(wide) <= 1
    assert all(p.dtype == torch.bfloat16 for block in blocks for p in block.parameters())
    inside = {id(p) for block in blocks for p in block.parameters()}
    assert all(p.dtype == torch.float32 for p in network.parameters() if id(p) not in inside)


def test_a_failing_block_gives_its_stored_weights_back(narrow_cascade: Path) -> None:
    network, _ = load_part(narrow_cascade / "stage_c.safetensors", "stage_c")
    place(network, Placement(CPU, torch.float32, "streamed"))
    with pytest.raises(RuntimeError):
        next(blocks_of(network))(torch.zeros(1, 5, 2, 2))
    assert next(next(blocks_of(network)).parameters()).dtype == torch.bfloat16


def test_blocks_are_the_children_of_block_lists(tiny_cascade: Path) -> None:
    network, _ = load_part(tiny_cascade / "stage_b.safetensors", "stage_b")
    expected = [
        block for side in (network.down_blocks, network.up_blocks) for level in side for block in level
    ]
    found = list(blocks_of(network))
    assert all(any(block is one for one in found) for block in expected)
    assert not any(isinstance(block, nn.ModuleList) for block in found)


def test_the_device_must_be_there() -> None:
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match=r'no device "cuda" here; this machine has .*cpu'):
            choose_device("cuda")


def test_precision_is_what_a_trial_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float16", CPU) == torch.float16
    for gain, expected in ((0.02, torch.float32), (1.1, torch.float32), (4.0, torch.bfloat16)):
        monkeypatch.setattr(placement, "_bfloat16_gain", lambda kind, gain=gain: gain)
        assert choose_dtype("auto", CPU) == expected


def test_the_trial_is_short() -> None:
    placement._bfloat16_gain.cache_clear()
    assert placement._bfloat16_gain("cpu") > 0


def needs() -> list[Need]:
    """Two stages: 100 and 1000 numbers stored in two bytes each, blocks of 10 and 50, 40 bytes to work in."""
    return [
        Need("stage_c", 100, 200, block=10, rest=20, working=40, matrices=70),
        Need("stage_b", 1000, 2000, block=50, rest=100, working=40, matrices=850),
    ]


@pytest.mark.parametrize(
    ("room", "weights", "keep"),
    [
        (5400, {"stage_c": "resident", "stage_b": "resident"}, True),
        (4500, {"stage_c": "resident", "stage_b": "resident"}, False),
        (3000, {"stage_c": "resident", "stage_b": "narrow"}, False),
        (1000, {"stage_c": "resident", "stage_b": "streamed"}, False),
    ],
)
def test_the_fastest_plan_that_fits_is_taken(room: int, weights: dict[str, str], keep: bool) -> None:
    chosen = capacity.plan(needs(), room)
    assert chosen is not None
    assert (chosen.weights, chosen.keep) == (weights, keep)
    assert capacity.peak(needs(), chosen) <= room


def test_weights_are_rounded_rather_than_streamed_where_that_is_allowed() -> None:
    tight = capacity.plan(needs(), 2000, int8=None)
    assert tight is not None
    assert tight.weights == {"stage_c": "int8", "stage_b": "int8"}
    roomy = capacity.plan(needs(), 5000, int8=None)
    assert roomy is not None
    assert not roomy.int8
    narrow = capacity.plan(needs(), 1200, int8=None)
    assert narrow is not None
    assert narrow.weights["stage_b"] == "streamed"


def test_low_memory_streams_everything() -> None:
    chosen = capacity.plan(needs(), 10**9, low_memory=True)
    assert chosen is not None
    assert set(chosen.weights.values()) == {"streamed"}
    assert not chosen.keep


def test_pictures_are_decoded_in_tiles_where_the_whole_is_too_large() -> None:
    tiles = (((64, 64), 3000), ((32, 32), 1000))
    stage_a = Need("stage_a", 10, 40, 0, 10, 9000, mapped=True, tiles=tiles)
    for room, tile in ((9500, None), (5000, (64, 64)), (2600, (32, 32))):
        chosen = capacity.plan([*needs(), stage_a], room)
        assert chosen is not None
        assert chosen.tile == tile
    between = capacity.plan([*needs(), stage_a], 4200, several=True)  # beside Stage B's narrow weights
    assert between is not None
    assert between.tile == (32, 32)


def test_what_fits_nowhere_has_no_plan() -> None:
    assert capacity.plan(needs(), 500) is None
    error = capacity.refusal(needs(), 500, "cpu", "Take a smaller one.")
    assert isinstance(error, CapacityError)
    assert f"stage_b needs at least {capacity.gigabytes(capacity.least(needs()))}" in str(error)
    assert capacity.plan(needs(), capacity.least(needs())) is not None


def test_a_limit_leaves_room_for_the_process_itself() -> None:
    room = capacity.room_on(CPU, 2**30)
    assert room == 2**30 - capacity.empty_process()
    assert capacity.room_on(CPU, 2**60) == capacity.room_on(CPU) or room > 0


def test_free_memory_is_a_plausible_number() -> None:
    assert 0 < capacity.free_memory(CPU) < 2**50


def test_weights_are_counted_from_the_header(narrow_cascade: Path) -> None:
    path = narrow_cascade / "stage_c.safetensors"
    header = read_header(path)
    need = measure("stage_c", header.shapes, header, 0)
    network, _ = load_part(path, "stage_c")
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
    assert need.numbers == sum(p.numel() for p in network.parameters())
    assert need.stored == 2 * need.numbers
    assert need.block == max(blocks)
