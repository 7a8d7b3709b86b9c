"""The five-minute path, measured: `python benchmarks/teach_subject.py OUT [--steps N]`.

Draws ten pictures of a creature that no training set has, runs the commands of docs/training.md (`prepare`,
`train --recipe lora`, `generate --lora`) and measures

    near     mean cosine of pictures to the taught ones, with the token and without it (the same prompts with
             the plain word), over the same seeds
    moved    how far pictures of other prompts are from those drawn without the LoRA (1 - cosine)

in the space of the model's own image encoder, and the seconds of every command. The bar: nearer by at least
0.15 with the token, and others moved by less than a tenth of that.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

from triptych.evaluation.taught import measure_taught
from triptych.images import grid
from triptych.pipelines.cascade import Cascade

NAME = "zorb"
BACKGROUNDS = ("#ffffff", "#f4f0e6", "#e8f1fa", "#fdeef0", "#eef7ea")


def draw_zorb(seed: int, side: int = 256) -> Image.Image:
    """A teal blob with an orange belly, one large eye, two antennae and orange feet, at 4x and shrunk."""
    rng = random.Random(seed)
    scale = 4
    image = Image.new("RGB", (side * scale, side * scale), rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(image)
    x, y = (side * scale * rng.uniform(0.44, 0.56) for _ in range(2))
    r = side * scale * rng.uniform(0.24, 0.3)
    tilt = rng.uniform(-0.15, 0.15) * r
    for way in (-1, 1):  # antennae and feet
        tip = (x + way * 0.55 * r + tilt, y - 1.55 * r)
        pen.line([(x + way * 0.3 * r, y - 0.8 * r), tip], fill="#0b5351", width=int(0.09 * r))
        pen.ellipse(box(*tip, 0.17 * r), fill="#ff8c1a")
        pen.ellipse(box(x + way * 0.5 * r, y + 1.02 * r, 0.32 * r, 0.2 * r), fill="#ff8c1a")
    pen.ellipse(box(x, y, r, 1.08 * r), fill="#1aa6a0")
    pen.ellipse(box(x, y + 0.45 * r, 0.55 * r, 0.45 * r), fill="#ffc27a")
    pen.ellipse(box(x + tilt / 2, y - 0.3 * r, 0.42 * r), fill="#ffffff")
    pen.ellipse(box(x + tilt, y - 0.28 * r, 0.2 * r), fill="#1b1b3a")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def box(x: float, y: float, rx: float, ry: float | None = None) -> list[float]:
    ry = rx if ry is None else ry
    return [x - rx, y - ry, x + rx, y + ry]


def command(*arguments: str, folder: Path) -> float:
    """Run a triptych command in a folder; returns its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "triptych.apps.cli.main", *arguments], cwd=folder, check=True)
    return time.perf_counter() - start


def measure(out: Path, model: str, word: str, seeds: int) -> dict[str, float]:
    """Draw with and without, and compare."""
    pictures = [Image.open(path).convert("RGB") for path in sorted((out / "pictures").glob("*.png"))]
    lora = str(out / f"{NAME}.safetensors")
    found = measure_taught(Cascade.load(model), lora, f"[{NAME}]", word, pictures, seeds=seeds)
    for name, images in found.shown.items():
        grid(images, columns=max(4, seeds)).save(out / f"{name}.png")
    share = found.moved / found.gain if found.gain else float("inf")
    return {"near_with": found.near_with, "near_without": found.near_without, "gain": found.gain,
            "moved": found.moved, "moved_share": share}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--word", default="object")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--measure-only", action="store_true")
    asked = parser.parse_args()
    out = asked.out.resolve()
    seconds: dict[str, float] = {}
    if not asked.measure_only:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        for number in range(10):
            draw_zorb(number).save(out / "pictures" / f"{number}.png")
        seconds["prepare"] = command("prepare", "pictures", "data", "--force", folder=out)
        changes = [part for change in asked.set for part in ("--set", change)]
        seconds["train"] = command(
            "train", "--recipe", "lora", "--data", "data", "--name", NAME, "--model", asked.model,
            "--set", f'lora.word="{asked.word}"', *changes, folder=out,
        )  # fmt: skip
        seconds["generate"] = command(
            "generate", f"a picture of [{NAME}] in snow", "--lora", f"{NAME}.safetensors", "--seed", "0",
            "--model", asked.model, folder=out,
        )  # fmt: skip
    figures = {**{f"seconds_{name}": value for name, value in seconds.items()},
               **measure(out, asked.model, asked.word, asked.seeds)}  # fmt: skip
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1))
    (out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
