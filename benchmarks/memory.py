"""Peak private memory of one step of each stage at full size, against what the planner foretells.

    python benchmarks/memory.py --pair cascade-lite --size 1024x1024 --weights narrow
    python benchmarks/memory.py --pair cascade --size 1024x1024 --weights int8 --limit 6GiB
    python benchmarks/memory.py --decode --size 2048x2048 --limit 512MiB
    python benchmarks/memory.py --errors

Weights are random, in files of the published layout and of bfloat16, written into --folder unless they are
there already (7 GB for the larger pair). Memory is what the process has that no file backs (RssAnon), sampled
every few milliseconds, over what it had before the first weight was there; pages of mapped files, over those
of then, are told apart. --weights: exact (whatever fits --limit without rounding), narrow, int8 or streamed.
With --limit the exit status is 1 when the peak is above it. --decode runs Stage A alone, in tiles that fit
the limit and then whole, and tells how far apart the two pictures are beside the tiles' edges and elsewhere.
--errors prints how far int8 networks are from exact ones, and how far int4 would be, which is not offered.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sampler import Sampler
from torch import Tensor, nn

from triptych import Cascade
from triptych.checkpoints.catalog import PUBLISHED, ModelFiles
from triptych.checkpoints.files import write_tensors
from triptych.checkpoints.keys import names_in_layout
from triptych.checkpoints.load import load_part
from triptych.conditioning.encode import Conditioning
from triptych.models.stage_a import STAGE_A, StageA
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.capacity import KEPT_SHARE, TRUNKS, Plan, peak, room_on
from triptych.pipelines.inputs import NOTHING
from triptych.pipelines.needs import Need
from triptych.pipelines.parts import Parts
from triptych.pipelines.placement import Placement, Weights, blocks_of, place
from triptych.pipelines.planning import needs_of, plan
from triptych.pipelines.request import Request
from triptych.pipelines.stages import Batch, Run
from triptych.pipelines.tiles import decode_in_tiles
from triptych.sizes import latent_size_b

STAGES = ("stage_c", "stage_b", "stage_a")
POOL = 2**22  # random numbers, dealt out again and again
TOKENS = 77
GROUP = 64  # weights that share a scale in int4
MIB = 2**20


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a network, one at a time, random and small enough to keep its maps finite."""

    def __init__(self, network: nn.Module, part: str, dtype: torch.dtype) -> None:
        theirs = names_in_layout(network.state_dict(), "official", part)
        self.shapes = {theirs[name][0]: tensor.shape for name, tensor in network.state_dict().items()}
        self.dtype = dtype
        self.pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith("running_var"):
            return torch.ones(shape, dtype=self.dtype)
        count = math.prod(shape)
        fan_in = max(1, math.prod(shape[1:]))
        start = sum(name.encode()) % 1000
        numbers = self.pool[start:].repeat(-(-count // (POOL - start)))[:count]
        # Gains and biases are smaller still: they would add up with depth.
        scale = 0.25 / math.sqrt(fan_in) if len(shape) > 1 else 0.02
        return (numbers * scale).view(shape).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_pair(pair: str, folder: Path) -> ModelFiles:
    """Files of a published pair with random weights, made unless they are there."""
    sizes = PUBLISHED[pair]
    builds: dict[str, tuple[Any, Any, torch.dtype]] = {
        "stage_c": (StageC, STAGE_C[sizes.stage_c], torch.bfloat16),
        "stage_b": (StageB, STAGE_B[sizes.stage_b], torch.bfloat16),
        "stage_a": (StageA, STAGE_A["full"], torch.float32),
    }
    paths = {}
    for part, (build, config, dtype) in builds.items():
        paths[part] = folder / f"{pair}-{part}.safetensors"
        if not paths[part].is_file():
            with torch.device("meta"):
                network = build(config)
            write_tensors(paths[part], RandomWeights(network, part, dtype))
    return ModelFiles(pair, **paths, text_encoder=Path(), tokenizer=None)


def plan_for(needs: list[Need], weights: str, room: int) -> Plan:
    """The plan asked for by name, or the planner's own within `room`."""
    places: dict[str, Weights] = {"narrow": "narrow", "int8": "int8", "streamed": "streamed"}
    if weights not in places:
        chosen = plan(needs, room)
        if chosen is None:
            raise SystemExit("Nothing fits this limit.")
        return chosen
    own = {need.stage: places[weights] if need.stage in TRUNKS else "resident" for need in needs}
    fitted = plan(needs, room, low_memory=weights == "streamed", int8=weights == "int8" or None)
    tile = fitted.tile if fitted is not None else None
    kept = min(256 * MIB, room // KEPT_SHARE)
    return Plan(own, keep=False, tile=tile, kept_bytes=kept)  # type: ignore[arg-type]


def measure_steps(files: ModelFiles, request: Request, weights: str, room: int) -> list[dict[str, Any]]:
    """One step of each stage: what was foretold and what was measured, in bytes, and seconds."""
    sampler = Sampler()
    parts = Parts(files, torch.device("cpu"), torch.float32)
    needs = needs_of(parts, request, STAGES)
    chosen = plan_for(needs, weights, room)
    parts.arrange(chosen)
    parts._checked.update(STAGES)  # looking for NaN reads whole files, which is no part of a step
    batch = random_batch(parts, request)
    run = Run(parts, request, NOTHING)
    rows = []
    with torch.no_grad():
        for need, steps in zip(needs, (run.compose, run._stage_b, run._stage_a), strict=True):
            parts.release()  # returns what the stage before let go of, as loading the next one does
            sampler.reset()
            start = time.perf_counter()
            for _ in steps(batch):
                pass
            seconds = time.perf_counter() - start
            foretold = peak([need], replace(chosen, weights={need.stage: chosen.weights[need.stage]}))
            rows.append(
                {
                    "stage": need.stage,
                    "weights": chosen.weights[need.stage],
                    "foretold": foretold,
                    "measured": sampler.private,
                    "mapped": sampler.mapped,
                    "seconds": round(seconds, 1),
                }
            )
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    sampler.close()
    rows[0]["tile"] = chosen.tile
    return rows


def measure_decode(files: ModelFiles, request: Request, room: int) -> dict[str, Any]:
    """Stage A in tiles: bytes foretold and measured, seconds, and its distance to the whole decode."""
    parts = Parts(files, torch.device("cpu"), torch.float32)
    (need,) = needs_of(parts, request, ("stage_a",))
    chosen = plan([need], room)
    if chosen is None or chosen.tile is None:
        raise SystemExit("Nothing fits this limit." if chosen is None else "This limit needs no tiles.")
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, *latent_size_b(*request.sides()), generator=draw)
    sampler = Sampler()
    network, _ = load_part(files.stage_a, "stage_a", finite=False)
    network = place(network, Placement(torch.device("cpu")))
    start = time.perf_counter()
    with torch.no_grad():
        tiled = decode_in_tiles(network, latents, chosen.tile)
        seconds, measured = time.perf_counter() - start, sampler.private
        sampler.close()
        whole = decode_in_tiles(network, latents, None)
    apart = (tiled - whole).abs().amax((0, 1)) / whole.std()  # (H, W)
    edge = torch.zeros_like(apart, dtype=torch.bool)
    for pixels, step in zip((edge, edge.T), chosen.tile, strict=True):
        for line in range(4 * step, len(pixels), 4 * step):
            pixels[line - 1 : line + 1] = True
    return {
        "tile": chosen.tile,
        "foretold": peak([need], chosen),
        "measured": measured,
        "seconds": round(seconds, 1),
        "difference at edges": float(apart[edge].max()),
        "difference elsewhere": float(apart[~edge].max()),
    }


def random_batch(parts: Parts, request: Request) -> Batch:
    """One picture with random conditions."""
    config = parts.info("stage_c").config
    draw = torch.Generator().manual_seed(1)
    told = [
        Conditioning(
            torch.randn(1, TOKENS, config["text_width"], generator=draw),
            torch.randn(1, 1, config["pooled_width"], generator=draw),
            torch.zeros(1, 1, config["image_width"]),
        )
        for _ in range(2)
    ]
    return Batch(request.pictures(), *told)


def rounding_errors(files: ModelFiles) -> dict[str, dict[str, float]]:
    """Relative error of the prediction of Stages C and B with rounded weights, on random inputs."""
    found = {}
    for part in TRUNKS:
        exact = answer_of(files, part, "exact")
        rounded = {name: answer_of(files, part, name) for name in ("int8", "int4")}
        found[part] = {name: float((exact - got).norm() / exact.norm()) for name, got in rounded.items()}
    return found


def answer_of(files: ModelFiles, part: str, weights: str) -> Tensor:
    """The prediction of a network with exact, int8 or int4 weights."""
    network, info = load_part(getattr(files, part), part, finite=False)
    if weights == "int4":
        for block in blocks_of(network):
            for parameter in block.parameters():
                if parameter.ndim == 2 and parameter.shape[1] % GROUP == 0:
                    parameter.data = to_int4(parameter.data)
    place(network, Placement(torch.device("cpu"), torch.float32, "int8" if weights == "int8" else "streamed"))
    draw, config = torch.Generator().manual_seed(2), info.config
    pooled = torch.randn(1, 1, config["pooled_width"], generator=draw)
    if part == "stage_c":
        x = torch.randn(1, config["channels"], 8, 8, generator=draw)
        rest = (torch.randn(1, TOKENS, config["text_width"], generator=draw), pooled)
    else:
        x = torch.randn(1, config["channels"], 64, 64, generator=draw)
        rest = (torch.randn(1, config["semantic_channels"], 8, 8, generator=draw), pooled)
    with torch.no_grad():
        return network(x, torch.tensor([0.5]), *rest)


def to_int4(matrix: Tensor) -> Tensor:
    """A matrix as numbers -7 to 7 with a scale for every GROUP of a row would give it back."""
    groups = matrix.float().view(len(matrix), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 7
    return ((groups / scale).round() * scale).view_as(matrix).to(matrix.dtype)


@contextmanager
def folder_or_temporary(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PUBLISHED), default="cascade-lite")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--weights", choices=("exact", "narrow", "int8", "streamed"), default="narrow")
    parser.add_argument("--limit", default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--errors", action="store_true")
    given = parser.parse_args()
    asked = {"size": given.size, "max_memory": given.limit, "batch": 1, "device": "cpu", "dtype": "float32"}
    request = Request(prompt="", **asked).replaced(
        seed=1, steps=1, guidance=4.0, sampler="ddpm", decoder_steps=1, decoder_guidance=1.1,
        decoder_sampler="ddpm",
    )  # fmt: skip
    with folder_or_temporary(given.folder) as folder:
        if given.errors:
            errors = {"mini": rounding_errors(Cascade.load("mini").files)}
            errors[given.pair] = rounding_errors(write_pair(given.pair, folder))
            print(json.dumps(errors, indent=1))
            return 0
        files = write_pair(given.pair, folder)
        limit = request.max_memory
        room = room_on(torch.device("cpu"), None) if limit is None else limit
        if given.decode:
            print(json.dumps(measure_decode(files, request, room), indent=1))
            return 0
        rows = measure_steps(files, request, given.weights, room)
    worst = max(row["measured"] for row in rows)
    print(json.dumps({"pair": given.pair, "size": given.size, "peak": worst, "stages": rows}, indent=1))
    for row in rows:
        ratio = row["measured"] / row["foretold"]
        told = f"{row['measured'] / MIB:.0f} MiB of {row['foretold'] / MIB:.0f} foretold ({ratio:.2f})"
        print(f"{row['stage']} {row['weights']}: {told}, {row['seconds']} s", file=sys.stderr)
    return int(limit is not None and worst > limit)


if __name__ == "__main__":
    sys.exit(main())
