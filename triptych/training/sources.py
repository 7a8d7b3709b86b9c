"""From the data table of the settings to a source, its canvases and the order of batches."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.data.batches import (
    Batch,
    BatchOrder,
    BatchPlan,
    draws,
    order_of,
)
from triptych.data.batches import load_batch as load_pixels
from triptych.data.buckets import buckets_of, make_buckets
from triptych.data.captions import caption_number, count_tags, rearrange
from triptych.data.shapes import Mix
from triptych.data.shards import SHARE_ALIKE, ShardIndex, without_share_alike
from triptych.data.sources import DrawnShapes, Joined, OnCanvases, Source
from triptych.errors import SettingsError
from triptych.training.config import DataSettings, RunSettings

# What a draw is for, after the four of data/batches.py; 5 is lora.py's.
CAPTION, TAGS, OTHER, REWORDING = 4, 6, 7, 8


class Pictures:
    """The pictures of a run: where they come from, on which canvases, in which order."""

    def __init__(self, settings: RunSettings) -> None:
        data = settings.data
        self.settings = settings
        self.shards: ShardIndex | None = None
        self.buckets = make_buckets(data.size, data.ratios, data.factor)
        self.forced = buckets_of((height, width) for width, height in data.canvases)
        self.buckets += self.forced
        self.source = self.build_source(data)

    def build_source(self, data: DataSettings) -> Joined:
        sources: list[Source] = []
        repeats = []
        if data.shards:
            self.shards = ShardIndex(data.shards, keep=None if data.share_alike else without_share_alike)
            sources.append(OnCanvases(self.shards, self.turns()) if self.forced else self.shards)
            repeats.append(data.repeat)
        if data.shapes:
            canvases = self.turns() or [(bucket.height, bucket.width) for bucket in self.buckets]
            together = sum(data.shapes_kinds.values())
            kinds = tuple((kind, share / together) for kind, share in data.shapes_kinds.items())
            mix = Mix(kinds, data.shapes_large)
            sources.append(DrawnShapes(data.shapes, data.shapes_seed, canvases, mix))
            repeats.append(1)
        if not sources:
            raise SettingsError("There are no pictures to train on: set data.shards, data.shapes or both.")
        return Joined(sources, repeats)

    def turns(self) -> list[tuple[int, int]]:
        """Canvases in the order in which pictures take them, the forced ones by their share; or none."""
        share, forced = self.settings.data.canvas_share, [(b.height, b.width) for b in self.forced]
        own = [(b.height, b.width) for b in self.buckets if b not in self.forced]
        repeats = max(1, round(len(forced) * (1 - share) / share / len(own)))
        turns: list[tuple[int, int]] = []
        for number, canvas in enumerate(forced):  # spread out, since neighbours in a shard are alike
            turns += [*(own * repeats)[number :: len(forced)], canvas]
        return turns

    def order(self, places: Sequence[int] | None = None) -> BatchOrder:
        """The batches; `places` are known buckets of the samples, from a cache."""
        settings = self.settings
        if places is not None:
            return BatchOrder(places, settings.batch, settings.seed)
        return order_of(self.source, self.buckets, settings.batch, settings.seed, settings.data.random_share)

    def load(self, plan: BatchPlan, places: Sequence[int]) -> Batch:
        """Pixels and samples at some places of a batch."""
        data, seed = self.settings.data, self.settings.seed
        return load_pixels(self.source, plan, self.buckets, seed, places, data.random_crop, data.zoom)

    def captions(self, batch: Batch, told: Sequence[int] | None = None) -> list[str]:
        """One caption for each sample of a batch; of the samples `told` where those are others."""
        known = [sample.captions for sample in batch.samples]  # of the next readable one where one is broken
        for at, (place, other) in enumerate(zip(batch.places, told or (), strict=False)):
            if other != batch.plan.samples[place]:
                known[at] = self.source.captions(other)
        return [
            self.caption(batch.plan, place, captions)
            for place, captions in zip(batch.places, known, strict=True)
        ]

    def caption(self, plan: BatchPlan, place: int, captions: Sequence[str]) -> str:
        """What is told at one place of a batch of a picture with these captions."""
        number = self.caption_number(plan, place, min(len(captions), self.settings.data.captions))
        return self.said(plan, place, captions, number)

    def said(self, plan: BatchPlan, place: int, captions: Sequence[str], number: int) -> str:
        """Caption number `number` as it is told at a place of a batch, -1 for the empty one."""
        return self.rearranged(captions[number], plan.step, place) if number >= 0 else ""

    def caption_number(self, plan: BatchPlan, place: int, count: int) -> int:
        """Which of `count` captions a sample shows at this step."""
        u = float(draws(self.settings.seed, plan.step, CAPTION, place, count=1)[0])
        return caption_number(count, u, self.settings.data.main_caption)

    def other_number(self, plan: BatchPlan, place: int, number: int, count: int) -> int:
        """Which of `count` captions may be told in the place of caption `number`: the empty one for that."""
        u = float(draws(self.settings.seed, plan.step, REWORDING, place, count=1)[0])
        return int(u * count) if number >= 0 else number

    def other_caption(self, plan: BatchPlan, place: int, told: str, captions: Sequence[str]) -> str:
        """One of a picture's captions that may be told in the place of `told`: the empty one for that."""
        count = min(len(captions), self.settings.data.captions)
        return self.said(plan, place, captions, self.other_number(plan, place, 0 if told else -1, count))

    def told_of(self, plan: BatchPlan, place: int) -> int:
        """The sample whose caption is told at a place of a batch: its own, or for `control.other_caption` of
        them that of the next place."""
        u = float(draws(self.settings.seed, plan.step, OTHER, place, count=1)[0])
        return plan.samples[(place + (u < self.settings.control.other_caption)) % len(plan.samples)]

    @property
    def rearranges(self) -> bool:
        """Whether captions change from one time they are told to the next."""
        return self.settings.data.shuffle_tags or self.settings.data.drop_tags > 0

    def rearranged(self, caption: str, step: int, place: int) -> str:
        """A caption with its tags in the order of this step."""
        data = self.settings.data
        if not self.rearranges:
            return caption
        u = draws(self.settings.seed, step, TAGS, place, count=2 * count_tags(caption))
        return rearrange(
            caption, u.tolist(), shuffle=data.shuffle_tags, keep=data.keep_tags, drop=data.drop_tags
        )

    def skipped(self) -> list[str]:
        """Samples that could not be read, with the reason."""
        if self.shards is None:
            return []
        lines = [f"{broken.shard}: {broken.key}: {broken.reason}" for broken in self.shards.broken]
        if self.shards.filtered:
            lines.append(
                f"{self.shards.filtered} pictures under {SHARE_ALIKE}, whose duties would pass to the "
                "weights: data.share_alike = true takes them"
            )
        return lines
