"""Latents and embeddings of a whole data set, made once and read by index while training.

A cache is a folder of safetensors files and a `made_from.json` that says what made it: the files of the
frozen parts, the files of the samples, the canvases. Anything else there means it is made again, but for a
finished cache that holds more than is asked for: Stage C reads that of Stage B. A build that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.files import read_tensors, write_atomically, write_tensors
from triptych.conditioning.encode import TextEncoder
from triptych.data.batches import crop_place, fit, stack_masks
from triptych.data.buckets import Bucket, nearest_bucket
from triptych.data.shards import Sample
from triptych.data.sources import Joined, Source
from triptych.images import to_pixels
from triptych.training.encoders import Encoded, Encoders, encode_pictures, shrink_mask
from triptych.training.grounding import UNKNOWN, object_map
from triptych.training.guess import UNNAMED, encode_prototypes

FORMAT = 4  # of what is kept; caches of another one are made again
CHUNK = 512  # samples a file
TOGETHER = 16  # samples encoded at once
INDEX = "index.json"  # written last


class Cache:
    """Encoded samples by index. `buckets[i]` is the canvas of sample i, -1 if it could not be read."""

    def __init__(self, folder: Path, originals: Sequence[int], text: TextEncoder) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.originals = originals  # what a sample that is repeated is kept under
        self.buckets: list[int] = index["buckets"]
        self.captions: list[int] = index["captions"]  # number of captions of each sample
        self.window = text.window
        self.tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("samples-*.safetensors")):
            self.tensors.update(read_tensors(path))
        empty_hidden, self.empty_pooled = text.encode([""])
        self.empty_hidden = empty_hidden[0]

    def read(
        self,
        samples: Sequence[int],
        captions: Sequence[int],
        told: Sequence[int] | None = None,
        others: Sequence[int] | None = None,
    ) -> Encoded:
        """The batch of these samples, each with the caption of that number, -1 for the empty caption; of the
        samples `told` if captions of others are wanted. `others` are numbers of captions beside those."""
        latents_c = self.stack("c", samples)
        latents_b, image = (
            self.stack(kind, samples) if self.find(kind, samples[0]) is not None else None for kind in "bi"
        )
        hidden, pooled = [], []
        for sample, caption in zip(samples if told is None else told, captions, strict=True):
            if caption < 0:
                hidden.append(self.empty_hidden)
            else:
                hidden.append(self.tensors[f"t.{self.originals[sample]}.{caption}"].float())
            pooled.append(self.pooled(sample, caption))
        other = None
        if others is not None:
            other = torch.stack([self.pooled(*which) for which in zip(samples, others, strict=True)])
        windows = max(-(-rows.shape[0] // self.window) for rows in hidden)
        return Encoded(
            latents_c, latents_b, torch.stack([self.padded(rows, windows) for rows in hidden]),
            torch.stack(pooled), image, self.masks(samples), self.objects(samples), self.prototypes(samples),
            other,
        )  # fmt: skip

    def pooled(self, sample: int, caption: int) -> Tensor:
        """The pooled text of caption number `caption` of a sample, -1 for the empty caption."""
        if caption < 0:
            return self.empty_pooled[0]
        return self.tensors[f"p.{self.originals[sample]}.{caption}"].float()

    def masks(self, samples: Sequence[int]) -> Tensor | None:
        """Masks of samples of one canvas as `Encoded` has them; None when none of them has one."""
        found = [self.find("m", sample) for sample in samples]
        return stack_known([None if mask is None else mask.float() for mask in found], 1)

    def objects(self, samples: Sequence[int]) -> Tensor | None:
        """Object maps of samples of one canvas; None when none of them has one."""
        return stack_known([self.find("o", sample) for sample in samples], UNKNOWN)

    def prototypes(self, samples: Sequence[int]) -> Tensor | None:
        """Latents of the prototypes that samples name; None when none of them does."""
        found = [self.find("g", sample) for sample in samples]
        return stack_known([None if latents is None else latents.float() for latents in found], UNNAMED)

    def stack(self, kind: str, samples: Sequence[int]) -> Tensor:
        """What is kept of each sample under `kind`: "c" or "b" (latents) or "i" (image embeddings)."""
        # Widened first, as masks are: under autocast to bfloat16, a CPU joins no float16.
        return torch.stack([self.tensors[f"{kind}.{self.originals[sample]}"].float() for sample in samples])

    def find(self, kind: str, sample: int) -> Tensor | None:
        """What is kept of a sample, or of the one that it repeats."""
        return self.tensors.get(f"{kind}.{self.originals[sample]}")

    def padded(self, rows: Tensor, windows: int) -> Tensor:
        """Zeros where padding was cut off, then windows of the empty prompt."""
        missing = -rows.shape[0] % self.window
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        more = windows - rows.shape[0] // self.window
        return torch.cat([rows, *[self.empty_hidden] * more])


def open_cache(
    folder: Path,
    source: Joined,
    buckets: Sequence[Bucket],
    encoders: Encoders,
    made_from: Mapping[str, Sequence[Path]],
    device: torch.device,
    progress: Callable[[int, int], None],
    captions: int,
    prototypes: bool = False,
) -> Cache:
    """The cache in `folder`, made or completed first if need be; `progress(done, of)` follows it. `made_from`
    names the files of each part that makes it; `prototypes` keeps those too."""
    assert encoders.text is not None
    folder.mkdir(parents=True, exist_ok=True)
    mark = {
        "format": FORMAT,
        "parts": {part: [digest(path) for path in paths] for part, paths in made_from.items()},
        "buckets": [asdict(bucket) for bucket in buckets],
        "captions": captions,
        "prototypes": prototypes,
        "samples": hashlib.sha256(source.mark().encode()).hexdigest(),
    }
    marks = folder / "made_from.json"
    found = json.loads(marks.read_text(encoding="utf-8")) if marks.exists() else {}
    finished = (folder / INDEX).exists()
    if found != mark and not (finished and holds(found, mark)):
        for stale in folder.glob("*"):
            stale.unlink()
        with write_atomically(marks) as file:
            file.write(json.dumps(mark).encode())
    originals = [source.original(number) for number in range(len(source))]
    chunks = range(0, len(source), CHUNK)
    places: dict[int, int] = {}
    counts: dict[int, int] = {}
    for start in chunks:
        path = folder / f"samples-{start // CHUNK:05d}.safetensors"
        numbers = range(start, min(start + CHUNK, len(source)))
        fresh = [number for number in numbers if originals[number] == number]
        if not fresh:
            continue
        if not path.exists():
            write_tensors(
                path,
                encode_chunk(source, fresh, buckets, encoders, device, progress, captions, prototypes),
            )
        progress(numbers.stop, len(source))
        tensors = read_tensors(path)
        places.update(zip(fresh, tensors["bucket"].tolist(), strict=True))
        counts.update(zip(fresh, tensors["captions"].tolist(), strict=True))
    with write_atomically(folder / INDEX) as file:
        every = {"buckets": places, "captions": counts}
        kept = {name: [known[number] for number in originals] for name, known in every.items()}
        file.write(json.dumps(kept).encode())
    return Cache(folder, originals, encoders.text)


def holds(found: dict[str, Any], mark: dict[str, Any]) -> bool:
    """Whether a cache made from `found` has all of one made from `mark`, and perhaps of more parts."""
    if found.get("format") != mark["format"]:
        return False
    more = {"parts": found["parts"] | mark["parts"], "prototypes": found["prototypes"] or mark["prototypes"]}
    return found == mark | more


def encode_chunk(
    source: Source,
    numbers: Sequence[int],
    buckets: Sequence[Bucket],
    encoders: Encoders,
    device: torch.device,
    progress: Callable[[int, int], None],
    limit: int,
    prototypes: bool,
) -> dict[str, Tensor]:
    """The tensors of some samples, float16: latents c.N and b.N, prototype g.N, mask m.N, embedding i.N,
    captions t.N.K and p.N.K; and the object map o.N, int8."""
    assert encoders.text is not None
    tensors: dict[str, Tensor] = {}
    place_of: list[int] = []
    captions: list[tuple[str, int, int]] = []
    counts: list[int] = []
    waiting: dict[int, list[tuple[int, Tensor, Sample]]] = {}

    def flush(place: int) -> None:
        members = waiting.pop(place, [])
        if not members:
            return
        pixels = torch.cat([pixels for _, pixels, _ in members]).to(device)
        for kind, encoded in zip("cbi", encode_pictures(encoders, pixels), strict=True):
            if encoded is not None:
                for (number, _, _), row in zip(members, encoded.to(torch.float16).cpu(), strict=True):
                    tensors[f"{kind}.{number}"] = row.clone()
        if prototypes:
            named = [source.prototype(number) for number, _, _ in members]
            latents = encode_prototypes(encoders.semantic, named, device).to(torch.float16).cpu()
            for (number, _, _), picture, row in zip(members, named, latents, strict=True):
                if picture is not None:
                    tensors[f"g.{number}"] = row.clone()
        for number, _, sample in members:
            height, width = tensors[f"c.{number}"].shape[-2:]
            found = object_map(sample.meta, sample.image.size, (height, width))
            if found is not None:
                tensors[f"o.{number}"] = found

    for number in numbers:
        sample = source.read(number)
        if sample is None:
            place_of.append(-1)
            counts.append(0)
            continue
        place = nearest_bucket(sample.image.height, sample.image.width, buckets)
        place_of.append(place)
        counts.append(min(limit, len(sample.captions)))
        captions += [(caption, number, k) for k, caption in enumerate(sample.captions[:limit])]
        bucket = buckets[place]
        at = crop_place(sample, bucket)
        pixels = to_pixels([fit(sample.image, bucket, at)])
        waiting.setdefault(place, []).append((number, pixels, sample))
        if sample.mask is not None:
            mask = stack_masks([fit(sample.mask, bucket, at)], bucket)
            assert mask is not None
            tensors[f"m.{number}"] = shrink_mask(mask)[0].to(torch.float16)
        if len(waiting[place]) == TOGETHER:
            flush(place)
            progress(number, len(source))
    for place in list(waiting):
        flush(place)
    captions.sort(key=lambda entry: len(entry[0]))  # alike lengths together: less padding to compute
    for start in range(0, len(captions), 4 * TOGETHER):
        group = captions[start : start + 4 * TOGETHER]
        hidden, pooled = encoders.text.encode([caption for caption, _, _ in group])
        for (_, number, k), rows, vector in zip(group, hidden, pooled, strict=True):
            real = int(rows.abs().sum(1).nonzero().max()) + 1  # padding is zero: not worth storing
            tensors[f"t.{number}.{k}"] = rows[:real].to(torch.float16).cpu().clone()
            tensors[f"p.{number}.{k}"] = vector.to(torch.float16).cpu().clone()
    tensors["bucket"] = torch.tensor(place_of)
    tensors["captions"] = torch.tensor(counts)
    return tensors


def stack_known(rows: Sequence[Tensor | None], missing: float) -> Tensor | None:
    """Rows of one shape stacked, those that are None full of `missing`; None when all are."""
    known = next((row for row in rows if row is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, missing) if row is None else row for row in rows])


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()
