"""Many pictures, stage by stage: each stage is loaded once, and what was interrupted goes on where it was.

Memory does not grow with the number of pictures. Between the stages what was read from the prompts lies in
files without names, and Stage C's latents in a work folder, from which another run takes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from triptych.checkpoints.files import read_tensors, write_tensors
from triptych.conditioning.encode import Conditioning
from triptych.errors import CapacityError, CheckpointError
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.prompt_file import WHICH, Wanted, joined, together
from triptych.pipelines.stages import Batch, Run

PICTURES_PER_RUN = 256  # that are put into batches together, by the lengths of their prompts
ENCODERS = ("text_encoder", "image_encoder", "semantic")
BEHIND_STAGE_C = {
    "decoder_steps", "decoder_guidance", "decoder_sampler", "decoder_reuse", "draft", "stage_a", "stage_b",
    "batch",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """`done` of `total` pictures have passed `stage`; the pictures that were finished are in `made`."""

    stage: str
    done: int
    total: int
    made: list[Made] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """A finished picture and what its PNG stores."""

    wanted: Wanted
    image: Image.Image
    metadata: dict[str, Any]


@dataclass
class _Job:
    """A batch on its way, and which pictures of the file it makes."""

    run: Run
    batch: Batch
    wanted: list[Wanted]
    kept: list[Path]  # where the latents_c of its pictures lie
    done: int = 0


def bulk(
    cascade: Cascade, wanted: Sequence[Wanted], work: Path, pipelined: bool = False
) -> Generator[Progress, None, None]:
    """Make all pictures of a cascade. Each comes once, as soon as it is finished, in any order.

    work: a folder for what lies between the stages. pipelined: Stage B works on one batch while Stage C makes
    the next; both must fit into memory beside each other. Raises what `Cascade.generate` raises.
    """
    wardrobes: dict[tuple[str, ...], list[Wanted]] = {}
    for one in wanted:
        wardrobes.setdefault(one.request.lora, []).append(one)
    for worn in wardrobes.values():
        yield from _alike(cascade, worn, work, pipelined)


def _alike(cascade: Cascade, wanted: Sequence[Wanted], work: Path, pipelined: bool) -> Iterator[Progress]:
    """Pictures that wear the same LoRAs."""
    kept = {one.place: work / f"{_digest(cascade, one)}.safetensors" for one in wanted}
    parted: tuple[list[Wanted], list[Wanted]] = [], []  # a batch has all of its latents_c or none
    for one in wanted:
        parted[kept[one.place].is_file()].append(one)
    groups = [group for part in reversed(parted) for group in together(part, PICTURES_PER_RUN)]
    runs = cascade.runs([joined(group) for group in groups])
    if pipelined and not cascade.parts.keep:
        raise CapacityError("Memory is too small for Stages B and C together; leave --pipelined out.")
    jobs: list[_Job] = []
    with cascade.parts.held(*ENCODERS):
        for run, group in zip(runs, groups, strict=True):
            jobs += _read(run, group, kept, work)
            yield Progress("text", sum(len(job.wanted) for job in jobs), len(wanted))
    if pipelined:
        yield from _overlapping(jobs, len(wanted))
    elif cascade.parts.keep:
        for job in jobs:
            _drain(job.run.compose(job.batch))
            yield from _finished(job, jobs)
    else:
        yield from _stage_by_stage(cascade, jobs)


def _read(run: Run, group: Sequence[Wanted], kept: dict[tuple[int, int], Path], work: Path) -> list[_Job]:
    """The batches of a run, with what was read from their prompts in files, and the latents there are."""
    reading = run.read()
    while True:
        try:
            next(reading)
        except StopIteration as end:
            batches: list[Batch] = end.value
            break
    jobs = []
    for batch in batches:
        own = [group[picture.index] for picture in batch.pictures]
        batch.cond, batch.uncond = _shelved([batch.cond, batch.uncond], work)
        job = _Job(run, batch, own, [kept[one.place] for one in own])
        with contextlib.suppress(CheckpointError):  # damaged or gone: made again
            if all(path.is_file() for path in job.kept):
                batch.latents_c = torch.stack([read_tensors(path)["latents_c"] for path in job.kept]).clone()
        jobs.append(job)
    return jobs


def _shelved(read: Sequence[Conditioning], work: Path) -> list[Conditioning]:
    """The same numbers in a file that is mapped into memory, and that goes when they are let go of."""
    path = work / "text.safetensors"
    tensors = {f"{row}.{column}": t for row, one in enumerate(read) for column, t in enumerate(astuple(one))}
    write_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()})
    mapped = read_tensors(path)
    with contextlib.suppress(OSError):  # some systems keep files that are mapped; the next one takes its name
        path.unlink()
    return [Conditioning(*(mapped[f"{row}.{column}"] for column in range(3))) for row in range(len(read))]


def _stage_by_stage(cascade: Cascade, jobs: Sequence[_Job]) -> Iterator[Progress]:
    total = sum(len(job.wanted) for job in jobs)
    done = 0
    with cascade.parts.held("stage_c"):
        for job in jobs:
            if job.batch.latents_c is None:
                _drain(job.run.compose(job.batch))
                _keep(job)
            done += len(job.wanted)
            yield Progress("stage_c", done, total)
    with cascade.parts.held("stage_b", "stage_a"):
        for job in jobs:
            yield from _finished(job, jobs)
            for path in job.kept:
                path.unlink(missing_ok=True)


def _keep(job: _Job) -> None:
    assert job.batch.latents_c is not None
    job.batch.latents_c = job.batch.latents_c.cpu()
    for path, latents in zip(job.kept, job.batch.latents_c, strict=True):
        write_tensors(path, {"latents_c": latents})


def _overlapping(jobs: Sequence[_Job], total: int) -> Iterator[Progress]:
    """Stage C of one batch in a thread of its own, beside Stages B and A of the batch before."""
    with ThreadPoolExecutor(1, "stage_c") as pool:
        ahead = pool.submit(_composed, jobs[0])
        for job, following in zip(jobs, [*jobs[1:], None], strict=True):
            ahead.result()
            if following is not None:
                ahead = pool.submit(_composed, following)
            yield from _finished(job, jobs)


def _composed(job: _Job) -> None:
    device = job.run.parts.device
    if device.type != "cuda":
        return _drain(job.run.compose(job.batch))
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        _drain(job.run.compose(job.batch))
    return stream.synchronize()


def _finished(job: _Job, jobs: Sequence[_Job]) -> Iterator[Progress]:
    """Stages B and A of a batch; afterwards nothing of it stays in memory."""
    total, before = sum(len(one.wanted) for one in jobs), sum(one.done for one in jobs)
    for event in job.run.finish(job.batch):
        if event.image is not None and event.metadata is not None:
            job.done += 1
            made = Made(job.wanted[event.step - 1], event.image, event.metadata)
            yield Progress("stage_a", before + event.step, total, [made])
    job.batch.latents_c = job.batch.latents_b = None
    job.batch.cond = job.batch.uncond = _NOTHING


def _drain(events: Iterator[Any]) -> None:
    for _ in events:
        pass


def _digest(cascade: Cascade, wanted: Wanted) -> str:
    """A name for the latents_c of a picture, which changes with all that they depend on."""
    files = [cascade.parts.header(part).path for part in ("stage_c", "text_encoder")]
    settings = wanted.request.model_dump(mode="json", exclude=WHICH | BEHIND_STAGE_C)
    facts = [settings, wanted.picture.prompt, wanted.picture.seed]
    facts += [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


_NOTHING = Conditioning(*(torch.empty(0) for _ in range(3)))
