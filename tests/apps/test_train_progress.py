"""What `triptych train` says where nobody looks at a bar."""

from __future__ import annotations

import re

import pytest

from triptych.apps.cli import train
from triptych.training.loop import Progress


def test_the_time_left_is_that_of_the_updates_also_after_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    lines = train.Lines()
    for what, last, seconds in (("cache", 600, 0.1), ("train", 50, 6.0)):
        for step in range(1, last + 1):
            clock[0] += seconds
            lines(Progress(what, step, 600 if what == "cache" else 100, 0.5))
    said = re.findall(r"train (\d+)/100, loss 0.5, (\d+) min left", capsys.readouterr().err)
    assert len(said) >= 5
    for step, minutes in said:  # six seconds an update
        assert float(minutes) == pytest.approx((100 - int(step)) / 10, abs=0.6)
