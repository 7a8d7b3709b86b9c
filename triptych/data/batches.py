"""Which samples make up which batch, and the batch itself.

The order is a function of (seed, step) and nothing else: a run continued at step 1000 sees what an
unbroken one sees there, on any number of processes. Each epoch shuffles every bucket, cuts it into full
batches, and shuffles those; what is left over in a bucket waits for another epoch's shuffle.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from triptych.data.buckets import (
    RANDOM_SHARE,
    Bucket,
    covering_size,
    crop_around,
    crop_corner,
    nearest_bucket,
)
from triptych.data.shards import Sample
from triptych.data.sources import Source
from triptych.errors import DataError, SettingsError
from triptych.images import to_pixels

Loaded = TypeVar("Loaded")

ELSEWHERE = 100  # samples tried beside a batch of which none can be read
SHUFFLE, SPREAD, MIX, CROP = range(4)  # what a draw is for, part of its key


def draws(seed: int, *key: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` uniform numbers in [0, 1) that depend on seed and key only, on every machine and version."""
    words = np.random.SeedSequence((seed, *key)).generate_state(2, np.uint64)
    raw = np.random.Philox(key=words).random_raw(count)
    return (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one step: all of one bucket. `first` is the global number of the first of them.

    Noise of training is keyed by (seed, step, place in the global batch); `first + place` counts samples
    over the whole run.
    """

    step: int
    epoch: int
    bucket: int
    samples: tuple[int, ...]
    first: int

    def for_rank(self, rank: int, world: int) -> tuple[int, ...]:
        """The places in the global batch that process `rank` of `world` takes."""
        share = len(self.samples) // world
        return tuple(range(rank * share, (rank + 1) * share))


class BatchOrder:
    """The batches of a run over samples with given buckets.

    `buckets[i]` is the bucket of sample i, or negative to leave it out. `batch_size` is the global one. With
    `random_share`, each epoch sends that share of samples to any bucket instead of their own.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size: int, seed: int = 0, random_share: float = 0.0
    ) -> None:
        self._own = np.asarray(buckets, dtype=np.int64)
        if batch_size < 1:
            raise SettingsError(f"A batch size of {batch_size} is not possible: give 1 or more.")
        if not (self._own >= 0).any():
            raise DataError("There is no sample to train on.")
        self.batch_size = batch_size
        self.seed = seed
        self.random_share = random_share
        self._count = int(self._own.max()) + 1
        self._ends: list[int] = []  # cumulative number of batches of the epochs looked at so far
        self._lock = threading.Lock()
        self._cached: tuple[int, list[tuple[int, tuple[int, ...]]]] | None = None

    def plan(self, step: int) -> BatchPlan:
        """The batch of `step` (from 0); may be called from several threads."""
        with self._lock:
            return self._plan(step)

    def _plan(self, step: int) -> BatchPlan:
        while not self._ends or self._ends[-1] <= step:
            epoch = len(self._ends)
            alike = self.random_share == 0 and epoch > 0  # all epochs are as long as the first
            length = self._ends[0] if alike else len(self._epoch(epoch))
            self._ends.append((self._ends[-1] if self._ends else 0) + length)
        epoch = bisect_right(self._ends, step)
        start = self._ends[epoch - 1] if epoch else 0
        bucket, samples = self._epoch(epoch)[step - start]
        return BatchPlan(step, epoch, bucket, samples, step * self.batch_size)

    def _epoch(self, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1]
        own = self._own
        if self.random_share > 0:
            u = draws(self.seed, epoch, SPREAD, count=2 * len(own)).reshape(2, -1)
            astray = (u[0] < self.random_share) & (own >= 0)
            own = np.where(astray, (u[1] * self._count).astype(np.int64), own)
        batches: list[tuple[int, tuple[int, ...]]] = []
        for bucket in range(self._count):
            members = np.flatnonzero(own == bucket)
            if len(members) == 0:
                continue
            keys = draws(self.seed, epoch, SHUFFLE, bucket, count=len(members))
            members = members[np.argsort(keys, kind="stable")]
            if len(members) < self.batch_size:  # a small bucket repeats its members to fill one batch
                members = np.resize(members, self.batch_size)
            for start in range(0, len(members) - self.batch_size + 1, self.batch_size):
                chunk = members[start : start + self.batch_size]
                batches.append((bucket, tuple(int(i) for i in chunk)))
        mixed = np.argsort(draws(self.seed, epoch, MIX, count=len(batches)), kind="stable")
        order = [batches[i] for i in mixed]
        self._cached = (epoch, order)
        return order


def order_of(
    source: Source,
    buckets: Sequence[Bucket],
    batch_size: int,
    seed: int = 0,
    random_share: float = RANDOM_SHARE,
) -> BatchOrder:
    """The order for a source: every picture in the bucket nearest to its shape, unreadable ones left
    out."""
    sizes = [source.size(index) for index in range(len(source))]
    for index, size in enumerate(sizes):
        if size is None:  # reading it notes why it cannot be read
            source.read(index)
    own = [-1 if size is None else nearest_bucket(*size, buckets) for size in sizes]
    return BatchOrder(own, batch_size, seed, random_share if len(buckets) > 1 else 0.0)


@dataclass(frozen=True)
class Batch:
    """Pictures of one canvas with their captions. `pixels` (B,3,H,W) in [0,1]; all lists have B entries.

    `mask` (B,1,H,W) is 1 where a picture matters, 0 where it does not; None when none of them has a mask.
    """

    plan: BatchPlan
    places: tuple[int, ...]  # which places of the global batch these are
    pixels: Tensor
    samples: list[Sample]
    mask: Tensor | None = None


def fit(
    image: Image.Image, bucket: Bucket, at: tuple[float, float] = (0.5, 0.5), zoom: float = 1.0
) -> Image.Image:
    """The picture resized until it covers the canvas `zoom` times over, and cropped at `at` (see
    `crop_corner`)."""
    height, width = covering_size(image.height, image.width, zoomed(bucket, zoom))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # PIL filters when shrinking
    top, left = crop_corner((height, width), bucket, at)
    return image.crop((left, top, left + bucket.width, top + bucket.height))


def load_batch(
    source: Source,
    plan: BatchPlan,
    buckets: Sequence[Bucket],
    seed: int = 0,
    places: Sequence[int] | None = None,
    random_crop: bool = True,
    zoom: float = 1.0,
) -> Batch:
    """Read, fit and stack the samples at some `places` of a step's global batch (None: all of them).

    A sample that cannot be read is replaced by the next readable one of the global batch, so that every
    process and every run makes the same choice. Raises `DataError` when none can be read.
    """
    bucket = buckets[plan.bucket]
    places = tuple(range(len(plan.samples)) if places is None else places)
    samples, pictures, masks = [], [], []
    for place in places:
        sample = _first_readable(source, plan, place)
        at = crop_place(sample, bucket, zoom)
        if random_crop:
            down, across = draws(seed, plan.step, CROP, place, count=2)
            at = float(down), float(across)
        samples.append(sample)
        pictures.append(fit(sample.image, bucket, at, zoom))
        masks.append(None if sample.mask is None else fit(sample.mask, bucket, at, zoom))
    return Batch(plan, places, to_pixels(pictures), samples, stack_masks(masks, bucket))


def crop_place(sample: Sample, bucket: Bucket, zoom: float = 1.0) -> tuple[float, float]:
    """Where a crop that is not random lies, as `fit` is told: around the picture's focus."""
    resized = covering_size(sample.image.height, sample.image.width, zoomed(bucket, zoom))
    return crop_around(resized, bucket, sample.focus)


def stack_masks(masks: Sequence[Image.Image | None], bucket: Bucket) -> Tensor | None:
    """(B,1,H,W) in [0,1] of masks on a canvas, all ones for those that are None; None when all are."""
    if all(mask is None for mask in masks):
        return None
    whole = Image.new("L", (bucket.width, bucket.height), 255)
    return to_pixels([(mask or whole).convert("RGB") for mask in masks])[:, :1]


def zoomed(bucket: Bucket, zoom: float) -> Bucket:
    return replace(bucket, height=round(bucket.height * zoom), width=round(bucket.width * zoom))


def _first_readable(source: Source, plan: BatchPlan, place: int) -> Sample:
    count = len(plan.samples)
    for offset in range(count):
        sample = source.read(plan.samples[(place + offset) % count])
        if sample is not None:
            return sample
    for offset in range(min(ELSEWHERE, len(source))):  # a whole batch is broken: a small bucket, say
        sample = source.read((plan.samples[place] + offset) % len(source))
        if sample is not None:
            return sample
    raise DataError(
        f"None of the {count} samples of step {plan.step} can be read, nor any of {ELSEWHERE} others: "
        "skipped.txt or the report of an earlier run says why."
    )


def stream(load: Callable[[int], Loaded], start: int, stop: int, ahead: int = 2) -> Iterator[Loaded]:
    """`load(step)` for the steps of a run in order, up to `ahead` of them being read meanwhile.

    With `ahead` 0 nothing runs beside the caller.
    """
    if ahead < 1:
        yield from (load(step) for step in range(start, stop))
        return
    with ThreadPoolExecutor(max_workers=ahead, thread_name_prefix="batches") as pool:
        pending: deque[Future[Loaded]] = deque()
        try:
            for step in range(start, stop):
                pending.append(pool.submit(load, step))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
