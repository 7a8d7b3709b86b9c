"""Our network and sampling loop against diffusers': same weights, inputs, precision and threads, in turn.

A contender is a function that does one step of a stage. Contenders take turns, so a slow moment of the
machine meets all of them, and their outputs are compared in the same run. Times are medians, on one thread of
a CPU in seconds of the processor, which other work does not count in; ratios are theirs over ours, so larger
is better for us. The floor (see floor.py) takes its turns among them.
"""

from __future__ import annotations

import gc
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.convert import convert_file, layout_tensors
from triptych.checkpoints.diffusers_config import model_config
from triptych.checkpoints.files import PartInfo, write_part
from triptych.checkpoints.load import config_fields, load_part
from triptych.diffusion.denoiser import BOTH, Denoised, Denoiser, Guidance
from triptych.diffusion.samplers import sample_ddpm
from triptych.diffusion.schedule import Schedule
from triptych.errors import MissingExtra
from triptych.evaluation.floor import Product, record_products, time_products
from triptych.models.scratch import Scratch
from triptych.models.stage_a import STAGE_A, StageA
from triptych.models.stage_b import STAGE_B, StageB, StageBConfig
from triptych.models.stage_c import STAGE_C, StageC, StageCConfig
from triptych.pipelines.speed import Branches, Speed

STEPS_C, STEPS_B = 20, 10  # of the pipeline that is put together from steps
GUIDANCE = 4.0
TEXT_TOKENS = 77
FLOOR_PRECISION = 0.01
FLOOR_TURNS = 3
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}  # best first
COMPARED_AT = 0.7  # the time that both networks are told when their outputs are compared
# diffusers works out 10000 t in the network's precision. Of all times only 0 leaves bfloat16 exact there, and
# so compares nothing but what the networks do.
COMPARED_AT_NARROW = 0.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured. `reduced` keeps widths and lowers depth; `whole` runs every step of the pipeline."""

    side: int = 1024
    repeats: int = 2
    reduced: bool = False
    whole: bool = False
    compiled: bool = False
    loading: bool = True
    speed: Speed = field(default_factory=Speed)  # our switches
    stage_c: str = "1b"
    stage_b: str = "700m"


@dataclass
class Measured:
    """One case. Seconds are medians by contender; `difference` is the largest between outputs, relative to
    the largest output. `errors`, where the precision is below float32, are distances of the outputs to what
    float32 gives with the same weights, relative (root mean square)."""

    seconds: dict[str, float]
    spread: dict[str, float]  # (largest - smallest) / median
    floor: float = 0.0
    difference: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def ratio(self) -> float:
        return self.seconds["diffusers"] / self.seconds["triptych"]

    def above_floor(self) -> float:
        """Their time above the floor over ours, neither less than a hundredth of the floor: it is not known
        any better."""
        least = FLOOR_PRECISION * self.floor
        ours = max(self.seconds["triptych"] - self.floor, least)
        return max(self.seconds["diffusers"] - self.floor, least) / ours


@dataclass
class Bench:
    """The result of a run; `as_json` is what `--json` prints."""

    cases: dict[str, Measured]
    plan: Plan
    device: str
    dtype: str
    threads: int
    peak_bytes: int
    machine: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "ratios": {name: case.ratio() for name, case in self.cases.items()},
            "compiled": {
                name: case.seconds["diffusers compiled"] / case.seconds["triptych compiled"]
                for name, case in self.cases.items()
                if "diffusers compiled" in case.seconds
            },
            "above_floor": {name: case.above_floor() for name, case in self.cases.items() if case.floor},
            "seconds": {name: case.seconds for name, case in self.cases.items()},
            "spread": {name: case.spread for name, case in self.cases.items()},
            "floor": {name: case.floor for name, case in self.cases.items() if case.floor},
            "difference": {name: case.difference for name, case in self.cases.items()},
            "errors": {name: case.errors for name, case in self.cases.items() if case.errors},
            "peak_memory": self.peak_bytes,
            "machine": self.machine,
            "device": self.device,
            "precision": self.dtype,
            "threads": self.threads,
            "plan": asdict(self.plan),
        }


def run_bench(plan: Plan, device: torch.device, dtype: torch.dtype, progress: Progress = print) -> Bench:
    """Measure everything that `plan` names. Raises MissingExtra without diffusers."""
    cases: dict[str, Measured] = {}
    torch.manual_seed(0)
    for name, bench in (("stage_c_step", bench_stage_c), ("stage_b_step", bench_stage_b)):
        progress(f"{name}: building {plan.stage_c if name == 'stage_c_step' else plan.stage_b}")
        cases[name] = bench(plan, device, dtype, progress)
        gc.collect()
    progress("stage_a_decode")
    cases["stage_a_decode"] = bench_stage_a(plan, device, progress)
    cases["pipeline"] = compose(cases)
    if plan.loading:
        progress("loading")
        cases["loading"] = bench_loading(plan, dtype, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    machine = {"processor": processor(device), "system": platform.system(), "torch": torch.__version__}
    return Bench(
        cases, plan, str(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), peak, machine
    )


def stage_c_config(plan: Plan) -> StageCConfig:
    config = STAGE_C[plan.stage_c]
    return replace(config, down_blocks=(1, 2), up_blocks=(2, 1)) if plan.reduced else config


def stage_b_config(plan: Plan) -> StageBConfig:
    config = STAGE_B[plan.stage_b]
    fewer = replace(config, down_blocks=(1, 1, 2, 1), up_blocks=(1, 2, 1, 1), up_repeats=(1, 1, 1, 1))
    return fewer if plan.reduced else config


def bench_stage_c(plan: Plan, device: torch.device, dtype: torch.dtype, progress: Progress) -> Measured:
    """Guided steps of Stage C: two branches in one batch, guidance, the sampler's arithmetic."""
    config = stage_c_config(plan)
    side = plan.side * 3 // 128  # 42.67 pixels per latent
    cond = {
        "text_hidden": torch.randn(2, TEXT_TOKENS, config.text_width, device=device, dtype=dtype),
        "text_pooled": torch.randn(2, 1, config.pooled_width, device=device, dtype=dtype),
        "image_embed": torch.zeros(2, 1, config.image_width, device=device, dtype=dtype),
    }
    x = torch.randn(1, config.channels, side, side, device=device)
    return bench_network(plan, "stage_c", StageC, config, x, cond, progress, dtype, STEPS_C)


def bench_stage_b(plan: Plan, device: torch.device, dtype: torch.dtype, progress: Progress) -> Measured:
    """Steps of Stage B without guidance, diffusers' default for its decoder."""
    config = stage_b_config(plan)
    side = plan.side * 3 // 128
    cond = {
        "semantic": torch.randn(1, config.semantic_channels, side, side, device=device, dtype=dtype),
        "text_pooled": torch.randn(1, 1, config.pooled_width, device=device, dtype=dtype),
    }
    x = torch.randn(1, config.channels, plan.side // 4, plan.side // 4, device=device)
    return bench_network(plan, "stage_b", StageB, config, x, cond, progress, dtype, STEPS_B)


def bench_network(
    plan: Plan, part: str, build: Any, config: Any, x: Tensor, cond: dict[str, Tensor],
    progress: Progress, dtype: torch.dtype, steps: int,
) -> Measured:  # fmt: skip
    """One stage, ours and theirs on the same weights (theirs are views of ours: one copy in memory)."""
    ours = random_network(build, config, x.device, dtype)
    theirs = build_theirs(import_theirs().unet, ours, part)
    count = len(cond["text_pooled"])
    narrow = dtype != torch.float32
    told = torch.full((count,), COMPARED_AT_NARROW if narrow else COMPARED_AT, device=x.device)
    doubled = torch.cat([x] * count).to(dtype)
    branches = our_branches(ours, cond, dtype, steps, plan.speed)
    progress(f"{part}: comparing outputs")
    with torch.no_grad():
        answer = torch.cat(list(branches(x, told[:1], BOTH[:count])))
        other = theirs(**their_names({"x": doubled, "t": told.to(dtype), **cond})).sample
        difference, errors = compare(answer, other), {}
        if narrow:
            exact = float32_answer(ours, doubled, told, cond)
            errors = {"triptych": distance(answer, exact), "diffusers": distance(other, exact)}
            del exact
    contenders = {
        "triptych": our_steps(branches, x, count, steps),
        "diffusers": their_steps(theirs, x, cond, dtype, steps),
    }
    if plan.compiled:
        progress(f"{part}: compiling both networks")
        speed = replace(plan.speed, compiled=True).ready(x.device)
        blocks = our_branches(ours, cond, dtype, steps, speed)
        contenders["triptych compiled"] = our_steps(blocks, x, count, steps)
        network: Any = torch.compile(theirs)
        contenders["diffusers compiled"] = their_steps(network, x, cond, dtype, steps)
        with torch.no_grad():
            difference = max(difference, compare(torch.cat(list(blocks(x, told[:1], BOTH[:count]))), answer))
            for name in ("triptych compiled", "diffusers compiled"):
                next(contenders[name])
    plain = Scratch(once=False, fused=False)
    products = record_products(lambda: ours(doubled, told, **cond, scratch=plain))
    progress(f"{part}: measuring")
    measured = take_turns(contenders, steps if plan.whole else plan.repeats, x.device, progress, products)
    measured.difference = difference
    measured.errors = errors
    return measured


def float32_answer(network: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What the plain formulas give in float32 with the weights and inputs of a narrower network.

    Each layer is wide only while it runs: a second network would take twice the memory of the first.
    """

    def widen(layer: nn.Module, *_: Any) -> None:
        for name, parameter in layer.named_parameters(recurse=False):
            narrow[layer, name], parameter.data = parameter.data, parameter.data.float()

    def restore(layer: nn.Module, *_: Any) -> None:
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.data = narrow.pop((layer, name))

    narrow: dict[tuple[nn.Module, str], Tensor] = {}
    hooks = []
    for layer in network.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(restore)]
    inputs = {name: value.float() for name, value in cond.items()}
    answer: Tensor = network(x.float(), t, **inputs, scratch=Scratch(once=False, fused=False))
    for hook in hooks:
        hook.remove()
    return answer


def our_branches(
    network: nn.Module, cond: dict[str, Tensor], dtype: torch.dtype, steps: int, speed: Speed
) -> Branches:
    """The network as the pipeline asks it, for one picture."""

    def answer(x: Tensor, t: Tensor, rows: slice, scratch: Scratch) -> Tensor:
        asked = {name: value[rows] for name, value in cond.items()}
        predicted: Tensor = network(x.to(dtype), t, **asked, scratch=scratch)
        return predicted

    _, logsnrs = Schedule().grid(steps)
    return Branches(answer, speed, [float(Schedule().time(logsnr)) for logsnr in logsnrs[:-1]])


def our_steps(branches: Branches, x: Tensor, count: int, steps: int) -> Iterator[Any]:
    schedule = Schedule()
    denoiser = Denoiser(branches, schedule, "eps", Guidance(GUIDANCE, rescale=0.0) if count == 2 else None)

    def denoise(x: Tensor, logsnr: Tensor, t: float) -> Denoised:
        branches.time = float(schedule.time(logsnr))
        return denoiser(x, logsnr, t)

    while True:
        yield from sample_ddpm(denoise, x, *schedule.grid(steps), lambda index: torch.randn_like(x))


def their_steps(
    network: nn.Module, x: Tensor, cond: dict[str, Tensor], dtype: torch.dtype, steps: int
) -> Iterator[Any]:
    """The loop of diffusers' Stable Cascade pipelines, step by step."""
    scheduler = import_theirs().scheduler()
    branches = len(cond["text_pooled"])
    while True:
        scheduler.set_timesteps(steps, device=x.device)
        state = x.to(dtype)
        for t in scheduler.timesteps[:-1]:
            told = t.expand(branches).to(dtype)
            inputs = {"x": torch.cat([state] * branches), "t": told, **cond}
            predicted = network(**their_names(inputs), return_dict=False)[0]
            if branches == 2:
                on, off = predicted.chunk(2)
                predicted = torch.lerp(off, on, GUIDANCE)
            state = scheduler.step(predicted, t.expand(1).to(dtype), state).prev_sample
            yield state


def bench_stage_a(plan: Plan, device: torch.device, progress: Progress) -> Measured:
    """Latents to pixels, in float32 as both programs do."""
    ours = random_network(StageA, STAGE_A["full"], device, torch.float32)
    theirs = build_theirs(import_theirs().vqgan, ours, "stage_a")
    side = plan.side // 4
    latents = torch.randn(1, 4, side, side, device=device)
    scale = ours.config.scale

    def forever(call: Callable[[], Tensor]) -> Iterator[Tensor]:
        while True:
            yield call()

    fused = plan.speed.fused
    with torch.no_grad():
        difference = compare(ours.decode(latents, fused), theirs.decode(latents * scale).sample)
    contenders = {
        "triptych": forever(lambda: ours.decode(latents, fused)),
        "diffusers": forever(lambda: theirs.decode(latents * scale).sample),
    }
    products = record_products(lambda: ours.decode(latents, fused=False))
    measured = take_turns(contenders, plan.repeats, device, progress, products)
    measured.difference = difference
    return measured


def bench_loading(plan: Plan, dtype: torch.dtype, progress: Progress) -> Measured:
    """From a bfloat16 file of Stage C to a network whose every number was read once."""
    config = stage_c_config(plan)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        network = random_network(StageC, config, torch.device("cpu"), torch.bfloat16)
        own = folder / "stage_c.safetensors"
        write_part(own, network.state_dict(), PartInfo("stage_c", config=config_fields(config)))
        del network
        (theirs,) = {path.parent for path in convert_file(own, folder / "prior", "diffusers")}
        unet = import_theirs().unet

        def ours() -> Iterator[nn.Module]:
            while True:
                # Looking for NaN reads every number, and so does widening: nothing is left to touch.
                yield load_part(own, "stage_c")[0].to(dtype)

        def diffusers() -> Iterator[Tensor]:
            while True:
                yield touched(unet.from_pretrained(theirs, torch_dtype=dtype))

        contenders = {"triptych": ours(), "diffusers": diffusers()}
        for contender in contenders.values():  # imports, and the file's way into memory
            next(contender)
        return take_turns(contenders, plan.repeats, torch.device("cpu"), progress)


def touched(network: nn.Module) -> Tensor:
    return torch.stack([parameter.sum().float() for parameter in network.parameters()]).sum()


def take_turns(
    contenders: dict[str, Iterator[Any]],
    repeats: int,
    device: torch.device,
    progress: Progress,
    products: Counter[Product] | None = None,
) -> Measured:
    """Seconds of one `next` of each contender, in turn; each has run once before. The floor that `products`
    make is measured in every one of the first turns, for machines are faster at one time than at another."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    floors: list[float] = []
    clock = clock_for(device)
    with torch.no_grad():
        for turn in range(repeats):
            for name, contender in contenders.items():
                synchronise(device)
                start = clock()
                next(contender)
                synchronise(device)
                seconds[name].append(clock() - start)
            if products is not None and turn < FLOOR_TURNS:
                floors.append(time_products(products, lambda: synchronise(device), clock))
            taken = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
            progress(f"  {turn + 1} of {repeats}: {taken}")
    medians = {name: median(times) for name, times in seconds.items()}
    spread = {name: (max(times) - min(times)) / medians[name] for name, times in seconds.items()}
    return Measured(medians, spread, median(floors) if floors else 0.0)


def compose(cases: dict[str, Measured]) -> Measured:
    """The whole pipeline from its steps."""
    counts = {"stage_c_step": STEPS_C, "stage_b_step": STEPS_B, "stage_a_decode": 1}
    parts = [(count, cases[case]) for case, count in counts.items()]
    names = sorted(cases["stage_c_step"].seconds.keys() & cases["stage_a_decode"].seconds.keys())
    return Measured(
        {name: sum(count * case.seconds[name] for count, case in parts) for name in names},
        {name: max(case.spread[name] for _, case in parts) for name in names},
        sum(count * case.floor for count, case in parts),
        max(case.difference for case in cases.values()),
    )


@torch.no_grad()
def random_network(build: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network with random weights in every tensor, made in its precision at once."""
    with torch.device("meta"):
        network = build(config)
    network = network.to(dtype).to_empty(device=device)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
            tensor.uniform_(-1, 1).mul_(fan_in**-0.5)
    return network.eval().requires_grad_(False)


def build_theirs(kind: Any, ours: nn.Module, part: str) -> Any:
    with torch.device("meta"):
        theirs = kind.from_config(model_config(part, ours.config))
    tensors = layout_tensors(ours.state_dict(), part, "diffusers")
    theirs.load_state_dict(tensors, assign=True)
    return theirs.eval().requires_grad_(False)


THEIR_NAMES = {
    "x": "sample",
    "t": "timestep_ratio",
    "text_hidden": "clip_text",
    "text_pooled": "clip_text_pooled",
    "image_embed": "clip_img",
    "semantic": "effnet",
}


def their_names(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {THEIR_NAMES[name]: value for name, value in inputs.items()}


def distance(answer: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of the exact answer."""
    return float((answer.float() - exact).norm() / exact.norm())


def compare(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@dataclass(frozen=True)
class Theirs:
    """The classes of diffusers that are measured."""

    unet: Any
    vqgan: Any
    scheduler: Any


def import_theirs() -> Theirs:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about optional packages of its own
            from diffusers import DDPMWuerstchenScheduler
            from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

            deprecated = find_spec("diffusers.pipelines.deprecated.wuerstchen")  # since 0.37
            folder = deprecated.name if deprecated else "diffusers.pipelines.wuerstchen"
            vqgan = import_module(f"{folder}.modeling_paella_vq_model").PaellaVQModel
    except ImportError:
        raise MissingExtra("diffusers", "test", "Measuring against diffusers") from None
    return Theirs(StableCascadeUNet, vqgan, DDPMWuerstchenScheduler)


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor where one thread does everything, else those on the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def processor(device: torch.device) -> str:
    """The name of what computes, and the widest units of a processor that tells them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", "").split()
    units = next((f" with {unit}" for flag, unit in UNITS.items() if flag in flags), "")
    return (told.get("model name") or platform.processor() or platform.machine()) + units


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
