"""Write the measured tables of docs/mini.md and docs/editing.md from the rows of `triptych evaluate`.

    python scripts/model_card.py runs/card --data data/icons/validation/val.tar

measures whatever runs/card does not hold yet (about 40 minutes on two cores; two evaluations at a time), then
writes every table between its `measured` comments anew. `--seeds 5` draws five pictures a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triptych.evaluation.pages import put_table

DOCS = Path(__file__).parent.parent / "docs"
VALIDATION = "--data val.tar"  # as tables show it
MEASURE = re.compile(r"\{(\w+)\.([^}]+)\}")

# Evaluations by the name of their rows: the longest first, so that two at a time end together.
EVALUATIONS = {
    "shapes": "shapes",
    "inpainting": f"inpainting {VALIDATION}",
    "super_resolution": f"super_resolution {VALIDATION}",
    "pixel_super_resolution": f"pixel_super_resolution {VALIDATION}",
    "canny": f"canny {VALIDATION}",
    "variations": f"variations {VALIDATION} --count 40 --seeds 2",
    "reconstruction": f"reconstruction {VALIDATION}",
    "icons": "icons",
    "words": "words",
    "looks": "looks",
    "binding": "binding",
    "image_encoder": f"image_encoder {VALIDATION}",
    "shapes_192x192": "shapes --size 192x192 --count 30",
    "shapes_384x256": "shapes --size 384x256 --count 30",
    "shapes_384x384": "shapes --size 384x384 --count 30",
}
SEEDED = ("shapes", "icons", "words")  # what `--seeds` concerns

CARD = """
| what | value | command |
|---|---|---|
| shapes, one object: colour and shape right | {shapes_single.right}; colour alone {shapes_single.colours} | shapes |
| shapes, two objects and their relation | {shapes_pairs.right}; both objects {shapes_pairs.objects}, colours {shapes_pairs.colours} | the same |
| pairs of colour and shape never trained | {shapes_heldout.right}; colours {shapes_heldout.colours} | the same |
| background asked for | {shapes_single.background} | the same |
| loss on pairs at time 0.8, forms exchanged in the caption | {binding.forms at 0.8} higher; colours {binding.colours at 0.8} | binding |
| icons: concept first of 100 | {icons.first}; among five {icons.top5} | icons |
| the same, told in other words than its name (72 descriptions) | {words.first}; among five {words.top5} | words |
| looks asked for of 20 things | {looks.right}; unasked {looks.unasked}; line art {looks.line art}, silhouettes {looks.silhouette}, black and white {looks.black and white}, purple, green and blue {looks.purple}, {looks.green}, {looks.blue} | looks |
| Stage A alone, 100 validation drawings | {reconstruction.a psnr}, SSIM {reconstruction.a ssim}, MobileNetV2 distance {reconstruction.a mobilenet distance} | reconstruction |
| B and A from true semantic latents | {reconstruction.b+a psnr}, SSIM {reconstruction.b+a ssim}, MobileNetV2 distance {reconstruction.b+a mobilenet distance} | the same |
| image encoder: own name first of 100 held-out drawings | {image_encoder.first}; among five {image_encoder.top5} | image_encoder |
| variations: the icon's concept first of 100 | {variations.variation, first}; among five {variations.variation, top5}; its reconstructions {variations.reconstruction, first}, random pictures {variations.random, first} | variations |
| ControlNet for edges: F1 within 2 pixels | {canny.f1, control}; no control {canny.f1, no control}, reconstruction {canny.f1, reconstruction}: {canny.obedience} of the way (aim: 0.5) | canny |
| ControlNet for holes: PSNR in the hole, distance | {inpainting.psnr, control}, {inpainting.distance, control}; mean colour {inpainting.psnr, mean colour}, {inpainting.distance, mean colour}; OpenCV {inpainting.psnr, opencv}, {inpainting.distance, opencv} | inpainting |
| shapes asked for in a hole | {inpainting.shape in a hole}; drawn freely {inpainting.shape drawn freely} | the same |
| ControlNet for small views (64 of 256 pixels) | {pixel_super_resolution.psnr, control}, distance {pixel_super_resolution.distance, control}, concept {pixel_super_resolution.concept first, control}; bicubic {pixel_super_resolution.psnr, bicubic}, {pixel_super_resolution.distance, bicubic}, {pixel_super_resolution.concept first, bicubic} | pixel_super_resolution |
| ControlNet for half the side, by latents | {super_resolution.psnr, control}, distance {super_resolution.distance, control}, concept {super_resolution.concept first, control}; bicubic {super_resolution.psnr, bicubic}, {super_resolution.distance, bicubic}, {super_resolution.concept first, bicubic} | super_resolution |
| one object at 192x192, 30 prompts | {shapes_192x192.right} | shapes_192x192 |
| one object at 384x256, 30 prompts | {shapes_384x256.right} | shapes_384x256 |
| one object at 384x384, 30 prompts | {shapes_384x384.right} | shapes_384x384 |
"""  # noqa: E501
VARIATIONS = """
| told | first | among five |
|---|---|---|
| nothing, one seed | {variations.random, first} | {variations.random, top5} |
| the picture | {variations.variation, first} | {variations.variation, top5} |
| its latents: the plain reconstruction | {variations.reconstruction, first} | {variations.reconstruction, top5} |
| the picture itself, judged | {variations.source, first} | {variations.source, top5} |
"""  # noqa: E501
TABLES = {"mini.md": CARD, "editing.md": VARIATIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of rows, one folder an evaluation")
    parser.add_argument(
        "--data", type=Path, help="validation drawings; needed while something is not measured"
    )
    parser.add_argument("--seeds", type=int, default=1, help="pictures a prompt, of shapes and icons")
    args = parser.parse_args()
    missing = [name for name in EVALUATIONS if not list((args.runs / name).glob("*.json"))]
    if missing and args.data is None:
        parser.error(f"{', '.join(missing)}: not measured yet; name the validation drawings with --data")
    with ThreadPoolExecutor(2) as pool:
        for name in pool.map(lambda name: measure(name, args.runs, args.data, args.seeds), missing):
            print(f"{name} is measured", flush=True)
    measured = read(args.runs)
    for page, table in TABLES.items():
        put_table(DOCS / page, "measured", fill(table, measured, args.seeds))
        print(f"{page} is written")


def measure(name: str, runs: Path, data: Path, seeds: int) -> str:
    """Run one evaluation."""
    words = EVALUATIONS[name].replace("val.tar", str(data.resolve())).split()
    words += ["--seeds", str(seeds)] if name in SEEDED and seeds > 1 else []
    run_evaluation(words, runs / name)
    return name


def run_evaluation(words: Sequence[str], out: Path) -> None:
    """`triptych evaluate` with these words, in a process of its own that uses one core."""
    command = [sys.executable, "-m", "triptych.apps.cli.main", "evaluate", *words, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def read(runs: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Measures by the evaluation's name; of shapes by the set's name, at other sizes single ones only."""
    found = {}
    for name in EVALUATIONS:
        for path in sorted((runs / name).glob("*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            rows = report["measures"] | {what: {"value": value} for what, value in report["numbers"].items()}
            if name == "shapes":
                found[path.stem] = rows
            elif path.stem in (name, "shapes_single"):
                found[name] = rows
    return found


def fill(table: str, measured: dict[str, dict[str, dict[str, float]]], seeds: int) -> str:
    lines = []
    for line in table.strip().splitlines():
        line = MEASURE.sub(lambda match: shown(match[2], measured[match[1]][match[2]]), line)
        what, _, name = line.removesuffix(" |").rpartition("| ")
        if name in EVALUATIONS:
            many = f" --seeds {seeds}" if name in SEEDED and seeds > 1 else ""
            line = f"{what}| `triptych evaluate {EVALUATIONS[name]}{many}` |"
        lines.append(line)
    return "\n".join(lines)


def shown(name: str, row: dict[str, float]) -> str:
    """A measure with its 95 % interval: decibels, distances and F1 as they are, all else in percent. A number
    of the whole set has no interval."""
    if "low" not in row:
        return f"{row['value']:.3f}"
    value, low, high = row["value"], row["low"], row["high"]
    if "psnr" in name:
        return f"{value:.1f} dB ({low:.1f} to {high:.1f})"
    if any(word in name for word in ("distance", "ssim", "f1")):
        return f"{value:.2f} ({low:.2f} to {high:.2f})"
    return f"{100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    main()
