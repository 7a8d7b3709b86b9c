"""Settings that make less work of a picture, alone and together, beside the plain sampler with fewer steps.

    python benchmarks/fast.py --out runs/fast                  # makes and judges, one file a setting
    python benchmarks/fast.py --out runs/fast --only fast "plain, 10 steps"
    python benchmarks/fast.py --students runs/students --times bench.json --into docs/performance.md
    python benchmarks/fast.py --shares                         # deep share of a pass at full size, measured
    python benchmarks/fast.py --whole --steps 8                # fast at full size, noise to pixels

A setting draws the same prompts from the same noise as the full one. Told of each: how many pictures are
right by the shapes judge, with a Wilson interval; the share lost or won against the full setting, with the
interval of paired shares; the distance of MobileNetV2's features to the full setting's pictures; and what the
work comes to on the published 1B and 700M at 1024x1024, put together from step times (--times: the file that
`triptych bench --json` wrote) and the passes counted here. Rows of students need --students, the folder in
which recipes/students/lora_guidance.toml and lora_lcm.toml wrote theirs. Nothing is judged a second time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import random_batch, write_pair
from torch import nn

from triptych import Cascade
from triptych.checkpoints.files import read_tensors, write_tensors
from triptych.evaluation.bench import random_network
from triptych.evaluation.evaluate import SEED_STRIDE
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.judges import judge_shapes
from triptych.evaluation.metrics import mean_interval, mobilenet_paired_distance, wilson
from triptych.evaluation.pages import put_table
from triptych.evaluation.prompts import shapes_prompts
from triptych.evaluation.statistics import paired_shares
from triptych.models.scratch import Scratch
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.fast import FAST
from triptych.pipelines.inputs import NOTHING, Inputs
from triptych.pipelines.parts import Parts
from triptych.pipelines.placement import choose_device, choose_dtype
from triptych.pipelines.request import Request
from triptych.pipelines.stages import Run

FULL = "full"
BASE = {"steps": 20, "decoder_steps": 10}  # the published settings, whatever the defaults of a model are
GUIDED, LCM = "lora_guidance/guided.safetensors", "lora_lcm/lcm.safetensors"  # under --students
SETTINGS: dict[str, dict[str, Any]] = {
    FULL: {},
    "fast": FAST,
    "plain, 5 + 3 steps": {"steps": 5, "decoder_steps": 3},
    "draft": {"draft": True},
    "plain, 10 steps": {"steps": 10},
    "dpmpp_2m, 10 steps": {"steps": 10, "sampler": "dpmpp_2m"},
    "guided at 0.4 to 1": {"guidance_interval": (0.4, 1.0)},
    "guided until branches agree to 0.12": {"guidance_agreement": 0.12},
    "deep levels of C every 2nd step": {"reuse": 2},
    "plain, 13 steps": {"steps": 13},
    "Stage B: plain, 3 steps": {"decoder_steps": 3},
    "Stage B: dpmpp_2m, 3 steps": {"decoder_steps": 3, "decoder_sampler": "dpmpp_2m"},
    "Stage B: deep levels every 4th step": {"decoder_reuse": 4},
    "fast, 8 steps, guidance student": {**FAST, "steps": 8, "lora": (GUIDED,), "guidance": 1.0},
    "fast, 8 steps": {**FAST, "steps": 8},
    "guidance student, 20 steps": {"lora": (GUIDED,), "guidance": 1.0},
    "no guidance, 20 steps": {"guidance": 1.0},
    "lcm student, 4 steps": {"lora": (LCM,), "guidance": 1.0, "steps": 4, "sampler": "lcm"},
    "lcm student, 4 + 3 steps": {
        "lora": (LCM,),
        "guidance": 1.0,
        "steps": 4,
        "sampler": "lcm",
        "decoder_steps": 3,
    },
    "plain, 4 steps": {"steps": 4},
    "plain, 4 steps, no guidance": {"steps": 4, "guidance": 1.0},
    "full, other noise": {"seed": 1},
}
# Share of the arithmetic of a pass that lies in the deep levels, counted; --shares takes the time of both.
DEEP = {"stage_c": 0.75, "stage_b": 0.77}


@dataclass(frozen=True)
class Times:
    """Seconds on the 1B and 700M at 1024x1024: a guided step of Stage C, a step of Stage B, Stage A, and the
    pipeline of diffusers: 20 guided steps, 10 steps and Stage A. As they are: AVX2, float32, two threads."""

    stage_c: float = 18.7
    stage_b: float = 20.7
    stage_a: float = 19.7
    diffusers: float = 718.0

    @classmethod
    def read(cls, path: Path) -> Times:
        """Those of a file that `triptych bench --json` wrote."""
        seconds = json.loads(path.read_text())["seconds"]
        own = [seconds[case]["triptych"] for case in ("stage_c_step", "stage_b_step", "stage_a_decode")]
        return cls(*own, seconds["pipeline"]["diffusers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fast"))
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--into", type=Path, help="write the table between the marks of this file")
    parser.add_argument("--students", type=Path, help="folder of the two students' runs")
    parser.add_argument("--times", type=Path, help="what `triptych bench --json` wrote")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--steps", type=int, default=FAST["steps"], help="of Stage C in --whole")
    parser.add_argument("--folder", type=Path, default=Path("runs/fast"), help="random weights of --whole")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    if told.shares:
        measure_shares()
        return
    if told.whole:
        measure_whole(told.folder, told.steps)
        return
    times = Times() if told.times is None else Times.read(told.times)
    told.out.mkdir(parents=True, exist_ok=True)
    cascade = Cascade.load(told.model)
    for name in told.only:
        settings = {**SETTINGS[name]}
        if "lora" in settings:
            if told.students is None:
                continue
            settings["lora"] = tuple(str(told.students / file) for file in settings["lora"])
        if not stored(told.out, name).is_file():
            judged = judge(cascade, name, settings, told.out, told.prompts)
            stored(told.out, name).write_text(json.dumps(judged))
            print(f"{name}: {sum(judged['right'])} of {len(judged['right'])} right", flush=True)
    text = table(told.out, weights_name(cascade), times)
    print(text)
    if told.into is not None:
        put_table(told.into, "fast", text)


def stored(out: Path, name: str) -> Path:
    return out / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")


def weights_name(cascade: Cascade) -> str:
    """What the numbers belong to: the first digits of the SHA-256 of the weights of Stages C and B."""
    digests = []
    for part in ("stage_c", "stage_b"):
        with cascade.parts.header(part).path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:12])
    return f"Stage C {digests[0]}, Stage B {digests[1]}"


def judge(cascade: Cascade, name: str, settings: dict[str, Any], out: Path, count: int) -> dict[str, Any]:
    """Make and judge the pictures of a setting; features and latents go into files beside the answer."""
    prompts = shapes_prompts()["shapes_single"][:count]
    first = settings.pop("seed", 0) * SEED_STRIDE
    inputs = NOTHING
    kept = stored(out, FULL).with_suffix(".safetensors")
    if settings and all(key.startswith("decoder_") or key == "draft" for key in settings):
        inputs = Inputs(latents_c=read_tensors(kept)["latents_c"])  # Stage C would give these again
    start = time.process_time()
    with counted(cascade) as passes:
        result = cascade.generate(
            [prompt.prompt for prompt in prompts],
            inputs,
            seeds=tuple(range(first, first + count)),
            **{**BASE, **settings},
        )
    seconds = time.process_time() - start
    features = load_judge().features(result.images)
    write_tensors(
        stored(out, name).with_suffix(".safetensors"), {"features": features, "latents_c": result.latents_c}
    )
    shown = out / stored(out, name).stem
    shown.mkdir(exist_ok=True)
    for index, image in enumerate(result.images[:12]):
        image.save(shown / f"{index:02}.png")
    right = [
        judge_shapes(image, prompt.objects, prompt.relations, prompt.background).right
        for image, prompt in zip(result.images, prompts, strict=True)
    ]
    each = {key: value / count for key, value in passes.items()}
    return {"right": right, "passes": each, "seconds": seconds / count, "taken over": inputs is not NOTHING}


@contextmanager
def counted(cascade: Cascade) -> Iterator[Counter[str]]:
    """Pictures that pass through the networks of Stages C and B, and through their deep levels."""
    passes: Counter[str] = Counter()
    handles = []

    def watch(network: nn.Module, key: str) -> None:
        def add(module: nn.Module, given: Any, answer: torch.Tensor) -> None:
            passes[key] += len(answer)

        handles.append(network.register_forward_hook(add))

    for part in ("stage_c", "stage_b"):
        with cascade.parts.turn(part) as network:
            watch(network, part)
            watch(network.up_blocks[0][-1], f"{part} deep")
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def composed(name: str, passes: dict[str, float], full: dict[str, float], times: Times) -> float:
    """Seconds on the 1B and 700M, of the passes of a picture; two passes of Stage C are a guided step."""
    if SETTINGS[name].get("draft"):
        return full["stage_c"] * times.stage_c / 2
    total = times.stage_a
    for part, each in (("stage_c", times.stage_c / 2), ("stage_b", times.stage_b)):
        own = passes if part in passes else full
        total += each * ((1 - DEEP[part]) * own[part] + DEEP[part] * own[f"{part} deep"])
    return total


def table(out: Path, weights: str, times: Times) -> str:
    """A row for every setting that was judged."""
    found = {
        name: json.loads(stored(out, name).read_text()) for name in SETTINGS if stored(out, name).is_file()
    }
    full = found[FULL]
    features = {
        name: read_tensors(stored(out, name).with_suffix(".safetensors"))["features"] for name in found
    }
    lines = [
        f"{len(full['right'])} prompts of single shapes, one seed, mini ({weights}).",
        "",
        "| setting | right | against full | distance to full's pictures | 1B + 700M | times diffusers |",
        "|---|---|---|---|---|---|",
    ]
    for name, judged in found.items():
        right = wilson(sum(judged["right"]), len(judged["right"]))
        change = paired_shares(full["right"], judged["right"])
        far = mean_interval(mobilenet_paired_distance(features[name], features[FULL]).tolist())
        seconds = composed(name, judged["passes"], full["passes"], times)
        against = f"{change.value:+.0%} ({change.low:+.0%} to {change.high:+.0%})"
        distance = f"{far.value:.3f} ({far.low:.3f} to {far.high:.3f})"
        if name == FULL:
            against, distance = "", ""
        lines.append(
            f"| {name} | {right.value:.0%} ({right.low:.0%} to {right.high:.0%}) | {against} | {distance} "
            f"| {seconds:.0f} s | {times.diffusers / seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def measure_shares() -> None:
    """How much of a pass of the 1B and the 700M at 1024x1024 lies in deep levels: time with and without."""
    conditions: dict[str, tuple[Any, Any, tuple[int, ...], dict[str, torch.Tensor]]] = {
        "stage_c": (StageC, STAGE_C["1b"], (1, 16, 24, 24),
                    {"text_hidden": torch.randn(2, 77, 1280), "text_pooled": torch.randn(2, 1, 1280)}),
        "stage_b": (StageB, STAGE_B["700m"], (1, 4, 256, 256),
                    {"semantic": torch.randn(1, 16, 24, 24), "text_pooled": torch.randn(1, 1, 1280)}),
    }  # fmt: skip
    for part, (kind, config, shape, beside) in conditions.items():
        network = random_network(kind, config, torch.device("cpu"), torch.float32)
        x, t, scratch = torch.randn(shape), torch.full((1,), 0.7), Scratch(reuse=2)
        call = partial(network, x, t, **beside, scratch=scratch)
        with torch.no_grad():
            _, _, whole, rest = [timed(call) for _ in range(4)]
        print(f"{part}: whole {whole:.1f} s, the rest {rest:.1f} s, deep {1 - rest / whole:.1%}", flush=True)


def measure_whole(folder: Path, steps: int) -> None:
    """Seconds from noise to pixels on the 1B and 700M at 1024x1024 with `fast` in so many steps, on the
    weights' own device and precision. Weights are random, their files written before and read as a user's
    are."""
    folder.mkdir(parents=True, exist_ok=True)
    request = Request(prompt="", size="1024x1024", batch=1).replaced(
        seed=1,
        guidance=4.0,
        decoder_guidance=1.0,
        **{"sampler": "ddpm", **FAST, "steps": steps},
    )
    device = choose_device("auto")
    parts = Parts(write_pair("cascade-lite", folder), device, choose_dtype("auto", device))
    batch, run = random_batch(parts, request), Run(parts, request, NOTHING)
    with torch.no_grad():
        for stage in (run.compose, run._stage_b, run._stage_a):
            start = time.perf_counter()
            for _ in stage(batch):
                pass
            print(f"{stage.__name__}: {time.perf_counter() - start:.1f} s", flush=True)


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
