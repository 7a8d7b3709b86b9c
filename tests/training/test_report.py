"""The report of a run is one file that needs nothing else, and shows what the log and the samples hold."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from triptych.training.config import check_settings
from triptych.training.report import duration, thinned, write_report

SETTINGS = check_settings(
    {"recipe": "stage_c", "out": "x", "name": "a <run>", "steps": 100, "data": {"shapes": 4}}, "test"
)


def write_log(out: Path, steps: int) -> None:
    lines = [
        {"step": step, "stage_c.loss": 1 / step, "stage_c.gradient_norm": 0.5, "samples_per_second": 3.5,
         "seconds_left": 240.0, "memory_bytes": 2**30, "loss_by_t": [None, *[0.1] * 9]}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "sta'  # the last line was cut off
    (out / "log.jsonl").write_text(text)


class Tags(HTMLParser):
    """Checks that every element is closed, and collects what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_whole_file(tmp_path: Path) -> None:
    write_log(tmp_path, 60)
    (tmp_path / "samples").mkdir()
    for step in range(30):
        Image.new("RGB", (64, 32), (step * 8, 0, 0)).save(tmp_path / "samples" / f"{step:07d}.png")
    page = write_report(tmp_path, SETTINGS, ["shard: key: <broken>"]).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.links) == 12
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert not re.search(r"https?://", page)
    for told in ("a &lt;run&gt;", "60 of 100", "4 min", "1.00 GiB", "&lt;broken&gt;", "Loss by noise level",
                 "update 29", "update 0", '"recipe": "stage_c"'.replace('"', "&quot;")):  # fmt: skip
        assert told in page, told


def test_a_run_without_any_line_has_a_report_too(tmp_path: Path) -> None:
    page = write_report(tmp_path, SETTINGS).read_text(encoding="utf-8")
    assert "0 of 100" in page
    assert "None." in page


def test_curves_are_thinned_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(1, 1001)]
    few = thinned(points)
    assert len(few) <= 400
    assert few[-1][0] == 1000
    assert math.isclose(sum(y for _, y in few) / len(few), 0.5, abs_tol=0.2)
    assert (duration(20), duration(240), duration(3900)) == ("20 s", "4 min", "1 h 05 min")
