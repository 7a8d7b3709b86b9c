"""From a cold process to a saved picture: how long, where it goes, and how it compares with importing torch.

    python benchmarks/cold_start.py [--model mini] [--repeats 3] [--limits]

Every measurement is a fresh process. Wall time suffers from whatever else the machine does, processor time
hardly; the last column divides by the processor time of a bare `python -c "import torch"`. With --limits the
exit status is 1 when help takes more than 0.5 s, one picture more than 12 s or four more than 20 s of wall
time (meant for two idle cores).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TRIPTYCH = [sys.executable, "-c", "from triptych.apps.cli.main import main; main()"]
PROMPT = "a red apple"


class Run(NamedTuple):
    """One finished process: wall-clock and processor seconds, and what it printed."""

    wall: float
    cpu: float
    printed: str


def timed(command: list[str]) -> Run:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limits", action="store_true", help="fail when a limit is passed")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:

        def generate(count: int) -> list[str]:
            options = ["--model", arguments.model, "--seed", "1", "--count", str(count), "--json"]
            return [*TRIPTYCH, "generate", PROMPT, *options, "--out", str(Path(folder) / str(count))]

        cases = {
            "import torch": ([sys.executable, "-c", "import torch"], None),
            "triptych --help": ([*TRIPTYCH, "--help"], 0.5),
            "one picture": (generate(1), 12.0),
            "four pictures": (generate(4), 20.0),
        }
        for command, _ in cases.values():  # once unmeasured, so that files come from memory for all alike
            timed(command)
        runs = {
            name: [timed(command) for _ in range(arguments.repeats)] for name, (command, _) in cases.items()
        }

    base = statistics.median(run.cpu for run in runs["import torch"])
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {arguments.repeats} runs each, model {arguments.model}")
    print(f"{'':<16} {'median':>8} {'least':>8} {'limit':>8} {'processor':>10} {'/ import torch':>15}")
    late = []
    for name, (_, limit) in cases.items():
        wall = statistics.median(run.wall for run in runs[name])
        least = min(run.wall for run in runs[name])
        cpu = statistics.median(run.cpu for run in runs[name])
        shown = "" if limit is None else f"{limit:.1f} s"
        print(f"{name:<16} {wall:>6.2f} s {least:>6.2f} s {shown:>8} {cpu:>8.2f} s {cpu / base:>15.2f}")
        if limit is not None and wall > limit:
            late.append(name)
    for name in ("one picture", "four pictures"):
        print(f"\nWhere {name} spent it (wall seconds):")
        parts = [json.loads(run.printed)["timings"] for run in runs[name]]
        for stage in parts[0]:
            print(f"  {stage:<8} {statistics.median(part[stage] for part in parts):.2f}")
    if late and arguments.limits:
        raise SystemExit(f"Too slow: {', '.join(late)}.")


if __name__ == "__main__":
    main()
