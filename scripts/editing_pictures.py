"""Make the pictures of docs/editing.md again: each strip by the commands that stand beside it.

    python scripts/editing_pictures.py [STRIP ...]

Runs in docs/editing, where the pictures that go in lie (apple.png, tree.png, sketch.png). Each mode gets
a strip there: what went in, then what came out, seed by seed, none left out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parent.parent / "docs" / "editing.md"
FOLDER = PAGE.with_suffix("")
HEIGHT = 128  # of a strip, in pixels
GAP = 6
STRIP = re.compile(r"!\[.*\]\(editing/(\w+)-strip\.png\)")
COMMAND = re.compile(r"^    (triptych .*)$", re.MULTILINE)


def main() -> None:
    wanted = sys.argv[1:]
    for name, commands in strips(PAGE.read_text(encoding="utf-8")).items():
        if not wanted or name in wanted:
            make(name, commands)


def strips(page: str) -> dict[str, list[str]]:
    """The commands of each strip: those indented lines between it and the sentence "Made by:" before it."""
    found = {}
    for match in STRIP.finditer(page):
        before = page[: match.start()]
        found[match[1]] = COMMAND.findall(before[before.rindex("Made by:") :])
    return found


def make(name: str, commands: list[str]) -> None:
    """Run the commands and put what they show side by side."""
    shown: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        made: list[Path] = []
        for number, command in enumerate(commands):
            words = shlex.split(command)
            shown += [path for word in words if (path := FOLDER / word).is_file() and path not in shown]
            out = Path(scratch) / str(number)
            print(command, flush=True)
            run = [sys.executable, "-m", "triptych.apps.cli.main", *words[1:], "--out", str(out)]
            subprocess.run(run, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
            made += sorted(out.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        beside([*shown, *made]).save(FOLDER / f"{name}-strip.png", optimize=True)


def beside(paths: list[Path]) -> Image.Image:
    """Pictures in a row, all of one height, few enough colours to keep the page light."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            size = (max(1, round(image.width * HEIGHT / image.height)), HEIGHT)
            images.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    whole = Image.new("RGB", (sum(image.width + GAP for image in images) - GAP, HEIGHT), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + GAP
    return whole.quantize(128, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
