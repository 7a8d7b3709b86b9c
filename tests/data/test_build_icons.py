"""The script that rebuilds the icon set: its catalogue agrees with known pictures, and it places drawings."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from load_script import load_script
from PIL import Image

from triptych.data.shards import ShardIndex

ROOT = Path(__file__).parents[2]
DOT = '<circle cx="18" cy="18" r="9" fill="red"/>'
ICONS = {"prefix": "x", "width": 36, "height": 36, "icons": {"dot": {"body": DOT}}}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("build_icons")


def test_the_catalogue_describes_the_pictures_of_the_fixture(script: ModuleType) -> None:
    rows = {row["key"]: row for row in script.catalogue()}
    assert len(rows) == 10_689
    assert sum(row["shard"] == "val" for row in rows.values()) == 400
    for sample in ShardIndex(ROOT / "recipes" / "tiny" / "fixture-64.tar"):
        if sample.key in rows:
            row = rows[sample.key]
            one = script.SETS[sample.key.split("_")[0]]
            assert script.metadata(row, one) == sample.meta
            drawn = np.abs(np.asarray(sample.image).astype(int) - script.BACKGROUNDS[row["background"]])
            longer = max(int(np.ptp(np.flatnonzero((drawn.max(2) > 24).any(axis)))) + 1 for axis in (0, 1))
            assert row["side"] == longer
    assert not any(
        row["key"].split("_")[0] in script.SHARE_ALIKE
        and row["shard"] not in ("train-00007", "train-00008", "val")
        for row in rows.values()
    )


def test_drawings_are_centred_on_their_background(script: ModuleType) -> None:
    drawing = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image = np.asarray(script.place(drawing, 200, (208, 244, 232)))
    assert image.shape == (256, 256, 3)
    assert tuple(image[0, 0]) == (208, 244, 232)
    red = (image == (255, 0, 0)).all(2)
    assert (np.flatnonzero(red.any(0))[[0, -1]] == (28, 227)).all()
    assert (np.flatnonzero(red.any(1))[[0, -1]] == (78, 177)).all()


def test_a_package_gives_its_drawing_without_a_rim(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "icons.json").write_text(json.dumps(ICONS))
    with tarfile.open(tmp_path / "iconify-json-twemoji-1.2.5.tgz", "w:gz") as tar:
        tar.add(tmp_path / "icons.json", "package/icons.json")
    drawing = script.Package("twemoji", tmp_path).drawing("dot")
    assert drawing.size == (224, 224)
    assert drawing.getpixel((112, 112)) == (255, 0, 0, 255)
