from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.data.batches import (
    BatchOrder,
    draws,
    fit,
    load_batch,
    order_of,
    stream,
)
from triptych.data.buckets import Bucket, buckets_of
from triptych.data.shards import ShardIndex
from triptych.data.sources import DrawnShapes, Joined
from triptych.errors import DataError, SettingsError

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"
THREE = buckets_of([(64, 64), (48, 80), (80, 48)])


def test_draws_depend_on_the_key_only() -> None:
    assert (draws(1, 2, 3, count=5) == draws(1, 2, 3, count=8)[:5]).all()
    assert not (draws(1, 2, 3, count=5) == draws(1, 3, 2, count=5)).any()
    assert draws(0, count=1)[0] == pytest.approx(0.0140670356656477, abs=1e-15)  # the same on every version


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_order_is_a_function_of_seed_and_step(share: float) -> None:
    buckets = [i % 3 for i in range(50)]
    unbroken = [BatchOrder(buckets, 4, seed=5, random_share=share).plan(step) for step in range(60)]
    resumed = BatchOrder(buckets, 4, seed=5, random_share=share)
    assert [resumed.plan(step) for step in range(37, 60)] == unbroken[37:]
    assert resumed.plan(3) == unbroken[3]
    other = BatchOrder(buckets, 4, seed=6, random_share=share)
    assert [other.plan(s).samples for s in range(9)] != [p.samples for p in unbroken[:9]]


def test_an_epoch_has_full_batches_of_one_bucket_and_no_sample_twice() -> None:
    buckets = [i % 3 for i in range(50)]
    order = BatchOrder(buckets, 4, seed=1)
    plans = [order.plan(step) for step in range(24)]
    first = [plan for plan in plans if plan.epoch == 0]
    assert len(first) == 17 // 4 + 17 // 4 + 16 // 4
    for plan in plans:
        assert len(plan.samples) == 4
        assert {buckets[i] for i in plan.samples} == {plan.bucket}
        assert plan.first == plan.step * 4
    assert max(Counter(i for plan in first for i in plan.samples).values()) == 1
    assert [p.samples for p in plans if p.epoch == 1] != [p.samples for p in first]


def test_small_buckets_are_filled_and_left_out_samples_stay_out() -> None:
    order = BatchOrder([0, 0, -1, 1], 3, seed=0)
    seen = {plan.bucket: plan.samples for plan in (order.plan(step) for step in range(2))}
    assert set(seen[0]) == {0, 1}
    assert seen[1] == (3, 3, 3)


def test_ranks_share_the_global_batch() -> None:
    plan = BatchOrder([0] * 32, 8).plan(0)
    places = [plan.for_rank(rank, 4) for rank in range(4)]
    assert [place for part in places for place in part] == list(range(8))


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(SettingsError, match="batch size of 0"):
        BatchOrder([0], 0)
    with pytest.raises(DataError, match="no sample"):
        BatchOrder([-1], 2)


def test_batches_have_the_canvas_and_the_captions() -> None:
    source = Joined([ShardIndex(FIXTURE), DrawnShapes(30, canvases=[(48, 80), (80, 48)])], [1, 2])
    assert len(source) == 64 + 60
    assert source.key(64) == source.key(94) == "shapes_00000000"
    order = order_of(source, THREE, batch_size=6, seed=2)
    for step in range(8):
        batch = load_batch(source, order.plan(step), THREE, seed=2)
        bucket = THREE[batch.plan.bucket]
        assert batch.pixels.shape == (6, 3, bucket.height, bucket.width)
        assert 0 <= batch.pixels.min() < batch.pixels.max() <= 1
        assert all(sample.caption for sample in batch.samples)


def test_two_ranks_read_what_one_process_reads() -> None:
    source = ShardIndex(FIXTURE)
    plan = order_of(source, THREE, 6).plan(1)
    whole = load_batch(source, plan, THREE)
    halves = [load_batch(source, plan, THREE, places=plan.for_rank(rank, 2)).pixels for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole.pixels)


def test_unreadable_samples_are_replaced_alike_everywhere(tmp_path: Path) -> None:
    for name in "abcd":
        Image.new("RGB", (64, 64), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    index = ShardIndex(tmp_path)
    plan = order_of(index, THREE, 4).plan(0)
    spoiled = tmp_path / f"{index.key(plan.samples[1])}.png"
    spoiled.write_bytes(spoiled.read_bytes()[:-30])
    index = ShardIndex(tmp_path)
    batch = load_batch(index, plan, THREE)
    assert torch.equal(batch.pixels[1], batch.pixels[2])
    alone = load_batch(index, plan, THREE, places=plan.for_rank(0, 2))
    assert torch.equal(alone.pixels, batch.pixels[:2])


def test_fitting_covers_the_canvas_and_keeps_the_ratio() -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((300, 100))
    fitted = fit(image, Bucket(64, 64, 1.0))
    assert fitted.size == (64, 64)
    assert fitted.getpixel((0, 0))[0] < 5
    assert fitted.getpixel((63, 63))[0] > 250


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_streams_keep_the_order(ahead: int) -> None:
    source = DrawnShapes(12, canvases=[(64, 64)])
    order = order_of(source, THREE, 3)
    steps = stream(lambda step: load_batch(source, order.plan(step), THREE), 2, 9, ahead)
    assert [batch.plan.step for batch in steps] == list(range(2, 9))


def test_a_stream_passes_errors_on() -> None:
    def load(step: int):
        raise DataError(f"step {step} is bad")

    with pytest.raises(DataError, match="step 4"):
        list(stream(load, 4, 6))
