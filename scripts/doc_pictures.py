"""Make the pictures of docs/editing.md and docs/mini.md again: each strip by the commands beside it.

    python scripts/doc_pictures.py [STRIP ...]

A page's commands run in the folder of its name, where what goes in lies (docs/editing/apple.png,
docs/mini/sixteen.txt). A strip shows the pictures that went in, then what came out, in order, none left out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("editing", "mini")
HEIGHT = 128  # of a row, in pixels
ROW = 8  # pictures, at most
GAP = 6
STRIP = re.compile(r"!\[.*\]\(\w+/(\w+)-strip\.png\)")
COMMAND = re.compile(r"^    (triptych .*)$", re.MULTILINE)


def main() -> None:
    wanted = sys.argv[1:]
    for page in PAGES:
        text = (DOCS / page).with_suffix(".md").read_text(encoding="utf-8")
        for name, commands in strips(text).items():
            if not wanted or name in wanted:
                make(name, commands, DOCS / page)


def strips(page: str) -> dict[str, list[str]]:
    """The commands of each strip: those indented lines between it and the sentence "Made by:" before it."""
    found = {}
    for match in STRIP.finditer(page):
        before = page[: match.start()]
        found[match[1]] = COMMAND.findall(before[before.rindex("Made by:") :])
    return found


def make(name: str, commands: list[str], folder: Path) -> None:
    """Run the commands in the folder and put what they show side by side."""
    shown: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        made: list[Path] = []
        for number, command in enumerate(commands):
            words = shlex.split(command)
            shown += [path for word in words if is_shown(path := folder / word, shown)]
            out = Path(scratch) / str(number)
            print(command, flush=True)
            run = [sys.executable, "-m", "triptych.apps.cli.main", *words[1:], "--out", str(out)]
            subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            made += sorted(out.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        beside([*shown, *made]).save(folder / f"{name}-strip.png", optimize=True)


def is_shown(path: Path, shown: list[Path]) -> bool:
    return path.suffix == ".png" and path.is_file() and path not in shown


def beside(paths: list[Path]) -> Image.Image:
    """Pictures in rows, all of one height, few enough colours to keep the page light."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            size = (max(1, round(image.width * HEIGHT / image.height)), HEIGHT)
            images.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    rows = [images[start : start + ROW] for start in range(0, len(images), ROW)]
    width = max(sum(image.width + GAP for image in row) for row in rows) - GAP
    whole = Image.new("RGB", (width, len(rows) * (HEIGHT + GAP) - GAP), "white")
    for number, row in enumerate(rows):
        left = 0
        for image in row:
            whole.paste(image, (left, number * (HEIGHT + GAP)))
            left += image.width + GAP
    return whole.quantize(128, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
