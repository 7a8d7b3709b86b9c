"""Binding is measured by what exchanged words cost: nothing for a network that only counts words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cascade import write_tiny_cascade
from torch import Tensor

from triptych.diffusion.prediction import add_noise, target
from triptych.diffusion.schedule import Schedule
from triptych.evaluation.binding import different_pairs, evaluate_binding, exchange, words
from triptych.pipelines.cascade import Cascade


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return Cascade.load(
        str(write_tiny_cascade(tmp_path_factory.mktemp("model"))), device="cpu", dtype="float32"
    )


def test_exchanged_captions_have_the_same_words_in_other_places() -> None:
    for sample in different_pairs(20):
        caption = sample.captions[1]
        assert "background" not in caption
        for kind in ("shape", "colour"):
            other = exchange(caption, *words(sample.meta, kind))
            assert other != caption
            assert Counter(other.split()) == Counter(caption.split())
            assert exchange(other, *words(sample.meta, kind)) == caption


def test_a_rise_is_what_the_formula_says_with_the_network_called_by_hand(cascade: Cascade) -> None:
    report = evaluate_binding(cascade, 2)
    parts, schedule = cascade.parts, Schedule()
    number = 1
    sample = different_pairs(2)[number]
    caption = sample.captions[1]
    assert report.rows[number]["prompt"] == caption
    pixels = torch.tensor(list(sample.image.tobytes())).view(256, 256, 3).permute(2, 0, 1)[None] / 255
    with parts.turn("semantic") as semantic, torch.no_grad():
        x0 = semantic(pixels)
    eps = torch.randn((2, *x0.shape[1:]), generator=torch.Generator().manual_seed(0))[number:]
    logsnr = schedule.logsnr(torch.tensor([0.8]))
    losses = []
    for told in (caption, exchange(caption, *words(sample.meta, "colour"))):
        with parts.turn("text_encoder") as encoder, parts.turn("stage_c") as network, torch.no_grad():
            hidden, pooled = encoder.encode([told])
            answer = network(add_noise(x0, eps, logsnr), schedule.time(logsnr), hidden, pooled)
        kind = parts.info("stage_c").settings["prediction"]
        losses.append((answer - target(kind, x0, eps, logsnr)).square().mean())
    rise = float(losses[1] / losses[0] - 1)
    assert report.rows[number]["colours at 0.8"] == pytest.approx(rise, rel=1e-2, abs=1e-4)
    mean = sum(row["colours at 0.8"] for row in report.rows) / 2
    assert report.measures["colours at 0.8"].value == pytest.approx(mean)


def test_a_network_that_only_counts_words_is_found_out(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cascade.parts.turn("text_encoder") as encoder:
        encode = type(encoder).encode

    def counted(self: Any, texts: list[str], *rest: Any) -> tuple[Tensor, Tensor]:
        return encode(self, [" ".join(sorted(text.split())) for text in texts], *rest)

    monkeypatch.setattr(type(encoder), "encode", counted)
    report = evaluate_binding(cascade, 3)
    assert all(abs(measure.value) < 1e-6 for measure in report.measures.values())


def test_mini_is_measured_offline_and_its_report_has_both_kinds(tmp_path: Path) -> None:
    report = evaluate_binding(Cascade.load("mini", device="cpu"), 4)
    assert set(report.measures) == {
        f"{kind} at {time}" for kind in ("forms", "colours") for time in (0.95, 0.8, 0.65)
    }
    assert all(measure.count == 4 for measure in report.measures.values())
