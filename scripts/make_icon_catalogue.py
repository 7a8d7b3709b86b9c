"""Write scripts/icons/catalogue.jsonl.xz from the icon set: which drawing, on which background, said how.

    python scripts/make_icon_catalogue.py --icons DIR

The catalogue holds no pictures; scripts/build_icons.py makes those again from the packages that it names.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from build_icons import BACKGROUNDS, CATALOGUE
from PIL import Image

from triptych.data.shards import ShardIndex

KEPT = ("captions", "name", "concept", "keywords", "group", "subgroup", "background", "colours", "emoji")
DIFFERENT = 24  # levels by which a pixel of the drawing differs from its background


def longer_side(image: Image.Image, background: str) -> int:
    """Height or width of what is drawn, whichever is more."""
    drawn = np.abs(np.asarray(image).astype(int) - BACKGROUNDS[background]).max(2) > DIFFERENT
    return max(int(np.ptp(np.flatnonzero(drawn.any(axis)))) + 1 for axis in (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="folder with the shards of the icon set")
    folder: Path = parser.parse_args().icons
    lines = []
    for shard in [*sorted(folder.glob("train-*.tar")), folder / "val.tar"]:
        for sample in ShardIndex(shard):
            meta = sample.meta
            row: dict[str, Any] = {"key": sample.key, "shard": shard.stem, "icon": meta["source_icon"]}
            row["side"] = longer_side(sample.image, meta["background"])
            row |= {name: meta[name] for name in KEPT}
            lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    CATALOGUE.parent.mkdir(exist_ok=True)
    CATALOGUE.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(lines)} drawings, {CATALOGUE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
