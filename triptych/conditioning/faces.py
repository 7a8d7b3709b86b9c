"""Faces for the identity control: where they are and whose, by ONNX models that the user brings.

The recogniser is an ArcFace network (112x112 pixels -> 512 numbers), the detector an SCRFD network; neither
comes with the package, because the public ones are for non-commercial use. Needs onnxruntime (the extra
`control`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.errors import CheckpointError, MissingExtra, RequestError

FACE_SIDE, FACE_MEAN, FACE_STD = 112, 127.5, 127.5  # what ArcFace sees
FINDER_SIDE, FINDER_MEAN, FINDER_STD = 320, 127.5, 128.0  # what SCRFD sees
STRIDES, ANCHORS = (8, 16, 32), 2
LEAST_SCORE, MOST_OVERLAP = 0.5, 0.4
MAX_FACES = 4
CELL = 32  # pixels
VECTOR = 512
# Where eyes, nose and corners of the mouth lie in the pictures ArcFace was trained on.
TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Face:
    """A face in a picture: its box (left, top, right, bottom) in pixels, and a unit vector (512,)."""

    box: tuple[float, float, float, float]
    vector: Tensor


def identity_map(size: Sequence[int], faces: Sequence[Face], spread: bool = False) -> Tensor:
    """The hint (512, H/32, W/32) for a picture of `size` (height, width): each box filled with its vector.

    Later faces lie over earlier ones; `spread` fills the whole map with the first. Halves round to even, and
    a box has at least one cell.
    """
    rows, columns = size[0] // CELL, size[1] // CELL
    hint = torch.zeros(VECTOR, rows, columns)
    for face in list(faces)[:1] if spread else faces:
        left, top, right, bottom = (round(edge / CELL) for edge in face.box)
        place = (
            np.s_[:, :, :] if spread else np.s_[:, top : max(bottom, top + 1), left : max(right, left + 1)]
        )
        hint[place] = face.vector[:, None, None]
    return hint


class FaceReader:
    """Finds faces and tells whose they are.

    Without a detector the whole picture, or the box given, is taken for the face. Raises MissingExtra without
    onnxruntime, CheckpointError for files that are missing or no ONNX model.
    """

    def __init__(self, recogniser: Path | str, detector: Path | str | None = None) -> None:
        self.recogniser = _session(recogniser, "face recogniser")
        self.detector = None if detector is None else _session(detector, "face detector")

    def find(self, pixels: Tensor, box: Sequence[float] | None = None) -> list[Face]:
        """At most MAX_FACES faces in pixels (3,H,W), the main one first; an empty list when there is none."""
        height, width = pixels.shape[-2:]
        if box is not None:
            x, y, wide, high = box
            return [self._read(pixels, (x, y, x + wide, y + high), None)]
        if self.detector is None:
            return [self._read(pixels, (0.0, 0.0, float(width), float(height)), None)]
        return [self._read(pixels, found, points) for found, points in self._detect(pixels)]

    def main(self, pixels: Tensor, box: Sequence[float] | None = None) -> list[Face]:
        """As `find`. Raises RequestError when there is no face."""
        faces = self.find(pixels, box)
        if not faces:
            raise RequestError(
                "No face was found in the picture: use one that shows a face larger and from the front, or "
                "say where it is with --box x,y,w,h."
            )
        return faces

    def _read(self, pixels: Tensor, box: tuple[float, ...], points: Array | None) -> Face:
        aligned = _aligned(pixels, similarity(points) if points is not None else _square(box))
        entered = ((aligned * 255 - FACE_MEAN) / FACE_STD)[None].numpy()
        vector = torch.from_numpy(np.asarray(_run(self.recogniser, entered)[0], dtype=np.float32)).flatten()
        if len(vector) != VECTOR:
            raise CheckpointError(f"The face recogniser gives {len(vector)} numbers; ArcFace gives {VECTOR}.")
        left, top, right, bottom = box
        return Face((left, top, right, bottom), F.normalize(vector, dim=0))

    def _detect(self, pixels: Tensor) -> list[tuple[tuple[float, float, float, float], Array | None]]:
        """Boxes and landmarks (5,2), if the detector gives them, by how main they are."""
        height, width = pixels.shape[-2:]
        scale = FINDER_SIDE / max(height, width)
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        entered = torch.zeros(1, 3, FINDER_SIDE, FINDER_SIDE)
        entered[..., : size[0], : size[1]] = F.interpolate(pixels[None].float().cpu(), size, mode="bilinear")
        outputs = _run(self.detector, ((entered * 255 - FINDER_MEAN) / FINDER_STD).numpy())
        if len(outputs) not in (6, 9):
            raise CheckpointError(f"The face detector has {len(outputs)} outputs; SCRFD has 6 or 9.")
        outputs = [np.asarray(output).reshape(-1, np.asarray(output).shape[-1]) for output in outputs]
        scores, boxes, points = decode_scrfd(outputs)
        boxes, points = boxes / scale, points / scale
        kept = suppress(boxes, scores)
        sizes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        away = ((boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([width, height]) / 2) ** 2
        kept.sort(key=lambda row: float(2 * away[row].sum() - sizes[row]))
        found = []
        for row in kept[:MAX_FACES]:
            left, top, right, bottom = (float(edge) for edge in boxes[row])
            found.append(((left, top, right, bottom), points[row] if points.size else None))
        return found


def decode_scrfd(outputs: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Scores (n,), boxes (n,4) and landmarks (n,5,2) or (0,) of an SCRFD network's raw maps [Guo 2021].

    Outputs are scores, box distances and landmark offsets, each for the strides in turn; distances are in
    strides from the cell's corner.
    """
    scores, boxes, points = [], [], []
    for level, stride in enumerate(STRIDES):
        cells = FINDER_SIDE // stride
        centres = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), axis=-1).reshape(-1, 2) * stride
        centres = np.repeat(centres, ANCHORS, axis=0).astype(np.float32)
        score = outputs[level][:, 0]
        far = outputs[level + 3] * stride
        good = score >= LEAST_SCORE
        scores.append(score[good])
        corners = np.concatenate([centres - far[:, :2], centres + far[:, 2:]], axis=1)
        boxes.append(corners[good])
        if len(outputs) == 9:
            offsets = (outputs[level + 6] * stride).reshape(-1, 5, 2)
            points.append((centres[:, None] + offsets)[good])
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(points) if points else np.empty(0)


def suppress(boxes: Array, scores: Array) -> list[int]:
    """Rows of boxes to keep: the best first, those that overlap a better one left out."""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for row in np.argsort(-scores):
        near = np.minimum(boxes[row, 2:], boxes[kept, 2:]) - np.maximum(boxes[row, :2], boxes[kept, :2]) + 1
        shared = near.clip(0).prod(axis=1)
        if not len(kept) or bool((shared / (areas[row] + areas[kept] - shared) <= MOST_OVERLAP).all()):
            kept.append(int(row))
    return kept


def similarity(points: Array) -> Array:
    """The (2,3) map from face coordinates to picture coordinates: turn, scale, shift [Umeyama 1991]."""
    source, target = np.array(TEMPLATE), np.asarray(points, dtype=np.float64)
    a, b = source - source.mean(0), target - target.mean(0)
    u, values, v = np.linalg.svd(b.T @ a)
    sign = np.diag([1.0, float(np.sign(np.linalg.det(u @ v)))])
    matrix = u @ sign @ v * ((values * sign.diagonal()).sum() / (a**2).sum())
    return np.concatenate([matrix, (target.mean(0) - matrix @ source.mean(0))[:, None]], axis=1)


def _square(box: Sequence[float]) -> Array:
    """The (2,3) map from face coordinates to the square around a box."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top, 1.0)
    scale = side / FACE_SIDE
    corner = (left + right - side) / 2, (top + bottom - side) / 2
    return np.array([[scale, 0, corner[0]], [0, scale, corner[1]]])


def _aligned(pixels: Tensor, matrix: Array) -> Tensor:
    """The face (3,112,112) cut out of pixels (3,H,W); black outside the picture."""
    height, width = pixels.shape[-2:]
    at = torch.arange(FACE_SIDE) + 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    mapped = torch.tensor(matrix, dtype=torch.float32) @ torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    places = (mapped.T.reshape(1, FACE_SIDE, FACE_SIDE, 2) / torch.tensor([width, height])) * 2 - 1
    return F.grid_sample(pixels[None].float().cpu(), places, align_corners=False)[0]


def _session(path: Path | str, what: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "control", "Reading faces") from None
    if not Path(path).is_file():
        raise CheckpointError(f"There is no {what} at {path}; give an ONNX file.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every fault
        raise CheckpointError(f"{path} is no ONNX model that can be run: {str(error)[:120]}.") from None


def _run(session: Any, entered: Array) -> list[Array]:
    try:
        outputs: list[Array] = session.run(None, {session.get_inputs()[0].name: entered.astype(np.float32)})
    except Exception as error:
        raise CheckpointError(f"The face model does not take {entered.shape}: {str(error)[:120]}.") from None
    return outputs
