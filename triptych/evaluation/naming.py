"""How well an image encoder agrees with the text tower: is a picture's own name the nearest of many?"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch.nn import functional as F

from triptych.data.sources import Source
from triptych.errors import DataError, RequestError
from triptych.evaluation.evaluate import TOP, Report, share
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.pictures import embed_pictures


def evaluate_image_encoder(cascade: Cascade, source: Source, count: int = 100) -> Report:
    """Embed `count` pictures of different things and their names; measure how often the own name is nearest.

    Nearest is by cosine between the picture's embedding and the pooled text of every name. A picture's name
    is its "name" in the data, or else its caption; of pictures of one "concept" (or else of one name) the
    first is taken. Nothing is drawn. Raises DataError for fewer than two names and RequestError for towers
    that do not share a space.
    """
    names, images = _named(source, count)
    embeds = embed_pictures(cascade.parts, images).float().cpu()
    with cascade.parts.turn("text_encoder") as encoder:
        pooled = encoder.encode(names)[1].float().cpu()
    if pooled.shape[1] != embeds.shape[1]:
        raise RequestError(
            f"Pictures are embedded in {embeds.shape[1]} numbers and names in {pooled.shape[1]}: the towers "
            "of this model do not share a space; measure one whose towers do, such as mini."
        )
    scores = F.normalize(embeds, dim=1) @ F.normalize(pooled, dim=1).T
    own = scores.diagonal()[:, None]
    ranks = ((scores > own).sum(1) + 1).tolist()
    rows: list[dict[str, Any]] = [
        {"name": name, "rank": rank, "first": rank == 1, f"top{TOP}": rank <= TOP, "nearest": names[nearest]}
        for name, rank, nearest in zip(names, ranks, scores.argmax(1).tolist(), strict=True)
    ]
    measures = {measure: share(rows, measure) for measure in ("first", f"top{TOP}")}
    return Report("image_encoder", measures, rows, {"names": len(names)}, images)


def _named(source: Source, count: int) -> tuple[list[str], list[Image.Image]]:
    """Names and pictures of the first `count` different things."""
    found: dict[str, tuple[str, Image.Image]] = {}
    for index in range(len(source)):
        if len(found) == count:
            break
        sample = source.read(index)
        if sample is not None:
            name = str(sample.meta.get("name") or sample.caption).strip()
            if name:
                found.setdefault(str(sample.meta.get("concept", name)), (name, sample.image))
    if len(found) < 2:
        raise DataError("Names are told apart among at least two; the data has too few pictures with a name.")
    return [name for name, _ in found.values()], [image for _, image in found.values()]
