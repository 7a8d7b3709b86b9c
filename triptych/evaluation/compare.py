"""Several systems draw the same prompts; everything is kept in one folder.

    OUT/study.json                  prompts, seeds, what each system is
    OUT/pictures/SYSTEM/*.png       00012-1000012.png: prompt 12, seed 1000012; settings inside
    OUT/records/SYSTEM/RANK.jsonl   a line a picture: when it was made, how long it took, memory
    OUT/index.html                  contact sheet, once all pictures are there
    OUT/results.jsonl               a line a picture: seconds, memory, what judges said (and results.parquet)

Running again goes on where it stopped. Under torchrun each process takes every WORLD_SIZE-th group of
tasks; groups do not depend on the number of processes, so neither do the pictures. The picture of prompt i
and seed s is drawn with seed s * SEED_STRIDE + i by every system: fixed beforehand, none is chosen.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych import __version__
from triptych.errors import DataError, SettingsError
from triptych.evaluation.evaluate import SEED_STRIDE
from triptych.evaluation.lines import LineWriter, read_lines
from triptych.evaluation.prompts import StudyPrompt
from triptych.evaluation.study_file import Study
from triptych.evaluation.systems import System, Task, TriptychSystem
from triptych.images import encode_png, replace

Progress = Callable[[str, int, int], None]  # system, pictures done, this process's share of it


@dataclass(frozen=True)
class Process:
    """Which of several processes this is; torchrun says so by environment variables."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Process:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = {name: os.environ.get(name, "") for name in names}
        if not given["WORLD_SIZE"]:
            return cls()
        try:
            rank, world, local = (int(given[name] or "0") for name in names)
        except ValueError:
            raise SettingsError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {given}.") from None
        if not 0 <= rank < world:
            raise SettingsError(f"RANK {rank} does not fit WORLD_SIZE {world}.")
        return cls(rank, world, local)


def compare(
    study: Study, out: Path, process: Process | None = None, progress: Progress | None = None
) -> bool:
    """Draw this process's share of what is missing; whether all pictures of all processes are there.

    Raises SettingsError when OUT holds pictures made with other settings.
    """
    process = process or Process()
    if process.world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(process.local_rank)
    out.mkdir(parents=True, exist_ok=True)
    record_study(study, out)
    tasks = study_tasks(study)
    for system in study.systems:
        draw_share(system, tasks, out, process, progress)
    return all(not missing(system.name, tasks, out) for system in study.systems)


def study_tasks(study: Study) -> list[Task]:
    """Every picture that each system is to make."""
    tasks = []
    for seed in study.settings.seeds:
        for index, prompt in enumerate(study.prompts):
            drawn = seed * SEED_STRIDE + index
            tasks.append(Task(index, prompt.prompt, drawn, f"{index:05d}-{drawn}"))
    return tasks


def record_study(study: Study, out: Path) -> None:
    """Write study.json, after checking that what is in OUT already belongs to the same study.

    Systems, prompts and seeds may be added; a system that has pictures keeps its settings.
    """
    path = out / "study.json"
    now: dict[str, Any] = {
        "version": __version__,
        "name": study.settings.name,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "settings": study.settings.model_dump(mode="json", exclude={"out", "name", "judge_weights"}),
        "systems": {system.name: system.describe() for system in study.systems},
        "prompts": [prompt.as_json() for prompt in study.prompts],
    }
    now = json.loads(json.dumps(now))
    before = read_json(path) if path.exists() else None
    if before is not None:
        _check_same(before, now, out)
    if before != now:
        replace(path, (json.dumps(now, ensure_ascii=False, indent=1) + "\n").encode())


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    for name, settings in before["systems"].items():
        if now["systems"].get(name, settings) != settings:
            mine = now["systems"][name]
            key = next(k for k in sorted({*mine, *settings}) if mine.get(k) != settings.get(k))
            raise SettingsError(
                f'{out} holds pictures of "{name}" made with {key} {settings.get(key)}, and now it is '
                f"{mine.get(key)}: give the system another name, or choose another out."
            )
        now["systems"].setdefault(name, settings)  # a system that is not asked for now keeps its place
    shared = min(len(before["prompts"]), len(now["prompts"]))
    if before["prompts"][:shared] != now["prompts"][:shared]:
        raise SettingsError(f"{out} belongs to a study with other prompts: choose another out.")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} holds no comparison: {path.name} is missing.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read: an object was expected.")
    return content


def draw_share(
    system: System, tasks: Sequence[Task], out: Path, process: Process, progress: Progress | None
) -> None:
    """Make what is missing of this process's groups of one system's tasks."""
    chunks = [tasks[start : start + system.chunk] for start in range(0, len(tasks), system.chunk)]
    own = chunks[process.rank :: process.world]
    undone = {task.stem for task in missing(system.name, tasks, out)}
    todo = [chunk for chunk in own if any(task.stem in undone for task in chunk)]
    total = sum(map(len, own))
    done = total - sum(map(len, todo))
    if not todo:
        return
    folder = out / "pictures" / system.name
    folder.mkdir(parents=True, exist_ok=True)
    records = out / "records" / system.name / f"{process.rank}.jsonl"
    system.load()
    try:
        with LineWriter(records) as writer:
            for chunk in todo:
                for row in draw_chunk(system, chunk, folder):
                    writer.append({**row, "rank": process.rank, "world": process.world})
                done += len(chunk)
                if progress is not None:
                    progress(system.name, done, total)
    finally:
        system.close()


def draw_chunk(system: System, chunk: Sequence[Task], folder: Path) -> list[dict[str, Any]]:
    """Make and store the pictures of one group; a record for each.

    A picture counts as made when its record is written, which is after its file is whole.
    """
    _reset_memory()
    start = time.perf_counter()
    saving = 0.0
    rows: list[dict[str, Any]] = []
    for drawn in system.draw(chunk):
        began = time.perf_counter()
        path = folder / f"{drawn.task.stem}.png"
        replace(path, encode_png(drawn.image, drawn.metadata))
        saving += time.perf_counter() - began
        size = list(drawn.image.size)
        rows.append(
            {"stem": drawn.task.stem, "index": drawn.task.index, "seed": drawn.task.seed, "size": size}
        )
    loading = system.loading_seconds() if isinstance(system, TriptychSystem) else 0.0
    seconds = (time.perf_counter() - start - saving - loading) / len(rows)
    measured = {
        "seconds": round(seconds, 4),
        "together": len(rows),
        "time": round(time.time(), 1),
        **_memory(),
    }
    return [{**row, **measured} for row in rows]


def missing(name: str, tasks: Sequence[Task], out: Path) -> list[Task]:
    """Tasks of a system without a record or a file."""
    recorded = {row["stem"] for row in read_records(name, out)}
    folder = out / "pictures" / name
    return [t for t in tasks if t.stem not in recorded or not (folder / f"{t.stem}.png").exists()]


def read_records(name: str, out: Path) -> Iterator[dict[str, Any]]:
    """The records of a system by all processes, the last of each picture."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "records" / name).glob("*.jsonl")):
        found.update((row["stem"], row) for row in read_lines(path) if "stem" in row)
    return iter(found.values())


def _reset_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux: the process's own peak begins anew
        Path("/proc/self/clear_refs").write_text("5")


def _memory() -> dict[str, Any]:
    """The most memory used since the last reset: on the device, or without one by the process.

    Systems that cannot reset it tell the process's peak so far.
    """
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_of": "device"}
    with contextlib.suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return {"peak_bytes": int(peak.split()[1]) * 1024, "peak_of": "process"}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_of": "process"}


def stored_prompts(out: Path) -> list[StudyPrompt]:
    """The prompts of the comparison in OUT."""
    return [StudyPrompt(**row) for row in read_json(out / "study.json")["prompts"]]
