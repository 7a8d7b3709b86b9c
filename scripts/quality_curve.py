"""Draw how judged quality grew while a Stage C was trained: docs/mini/quality.svg.

    python scripts/quality_curve.py runs/curve 0=first.safetensors 700=next.safetensors 2000=last.safetensors

Each snapshot, named by what it had been through (updates), is measured by `triptych evaluate shapes` and
`icons` on 100 fixed prompts, one seed, unless runs/curve holds its rows already; two at a time.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model_card import run_evaluation

from triptych.checkpoints.files import write_atomically
from triptych.evaluation.charts import curve_plot
from triptych.evaluation.metrics import Estimate

CHART = Path(__file__).parent.parent / "docs" / "mini" / "quality.svg"
MEASURES = {
    "one object": ("shapes_single", "right"),
    "two objects": ("shapes_pairs", "right"),
    "pairs never trained": ("shapes_heldout", "right"),
    "icon named first": ("icons", "first"),
}
NOTE = "share of 100 fixed prompts, one seed, with 95 % interval; judged by triptych evaluate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of rows, one folder a snapshot")
    parser.add_argument("snapshots", nargs="+", metavar="UPDATES=FILE", help="files of Stage C")
    parser.add_argument("--along", default="updates", help="what the numbers count")
    parser.add_argument("--out", type=Path, default=CHART)
    args = parser.parse_args()
    snapshots = {int(count): path for count, _, path in (given.partition("=") for given in args.snapshots)}
    jobs = [
        (what, path, args.runs / str(count) / what)
        for count, path in snapshots.items()
        for what in ("shapes", "icons")
        if not list((args.runs / str(count) / what).glob("*.json"))
    ]
    with ThreadPoolExecutor(2) as pool:
        for what, path, out in pool.map(measure, jobs):
            print(f"{what} of {path}: {out}", flush=True)
    curves = {
        name: [(count, read(args.runs / str(count), *place)) for count in sorted(snapshots)]
        for name, place in MEASURES.items()
    }
    with write_atomically(args.out) as file:
        file.write(curve_plot("Judged quality over training", curves, args.along, NOTE).encode())


def measure(job: tuple[str, str, Path]) -> tuple[str, str, Path]:
    """Run one evaluation."""
    what, path, out = job
    run_evaluation([what, "--stage-c", path], out)
    return job


def read(folder: Path, name: str, what: str) -> Estimate:
    """One measure of one snapshot."""
    (path,) = folder.glob(f"*/{name}.json")
    row = json.loads(path.read_text(encoding="utf-8"))["measures"][what]
    return Estimate(**row)


if __name__ == "__main__":
    main()
