"""What `triptych train` says: before a run, and where nobody looks at a bar."""

from __future__ import annotations

import re

import pytest

from triptych.apps.cli import train
from triptych.pipelines import placement
from triptych.training.config import check_settings
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


@pytest.mark.parametrize(
    ("gain", "precision", "said"),
    [(7.8, "float32", True), (7.8, "bfloat16", False), (1.6, "float32", False), (0.0, "float32", False)],
)
def test_a_machine_that_is_much_faster_in_bfloat16_is_told_of(
    gain: float,
    precision: str,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(placement, "_measure_gain", lambda kind, side: gain)
    placement._bfloat16_gain.cache_clear()
    raw = {"recipe": "stage_c", "out": "-", "data": {"shapes": 4}, "precision": precision}
    settings = check_settings(raw, "test")
    train.tell_precision(settings)
    placement._bfloat16_gain.cache_clear()  # nobody else is to meet the made-up gain
    told = capsys.readouterr().err
    assert ("8 times faster in bfloat16 here: --set precision=bfloat16" in told) is said
    assert bool(told) is said
    assert settings.precision == precision
