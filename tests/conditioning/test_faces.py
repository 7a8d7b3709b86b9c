"""Faces are found and read by ONNX models; whatever is missing has its sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from triptych.conditioning.faces import (
    TEMPLATE,
    FaceReader,
    decode_scrfd,
    identity_map,
    similarity,
    suppress,
)
from triptych.conditioning.hints import KINDS, Tools
from triptych.errors import CheckpointError, MissingExtra, RequestError


def save(path: Path, nodes: list, inputs: tuple, outputs: list, constants: dict[str, np.ndarray]) -> Path:
    made = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    entries = [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)]
    leaves = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "tiny", entries, leaves, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def write_recogniser(path: Path, length: int = 512) -> Path:
    """The mean colour of the face, spread over `length` numbers."""
    weights = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["vector"]),
    ]
    return save(path, nodes, (1, 3, 112, 112), ["vector"], {"weights": weights})


def write_detector(path: Path, score: float = 0.9) -> Path:
    """SCRFD's nine maps: one face in the middle cell of the coarsest level, if its score is high enough."""
    names, constants = [], {}
    for kind, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            count = (320 // stride) ** 2 * 2
            array = np.zeros((count, width), dtype=np.float32)
            if stride == 32:
                array[(5 * 10 + 5) * 2] = {"score": [score], "box": [2.0] * 4, "points": POINTS}[kind]
            constants[f"{kind}{stride}"] = array
            names.append(f"{kind}_{stride}")
    nodes = [helper.make_node("ReduceMean", ["x"], ["zero"], axes=[0, 1, 2, 3], keepdims=0),
             helper.make_node("Mul", ["zero", "nothing"], ["none"])]  # fmt: skip
    nodes += [helper.make_node("Add", [name.replace("_", ""), "none"], [name]) for name in names]
    return save(path, nodes, (1, 3, 320, 320), names, constants | {"nothing": np.zeros((), np.float32)})


POINTS = [-0.8, -0.6, 0.8, -0.6, 0.0, 0.0, -0.6, 0.8, 0.6, 0.8]  # of an upright face, in strides


def test_a_face_is_found_aligned_and_read(tmp_path):
    reader = FaceReader(write_recogniser(tmp_path / "r.onnx"), write_detector(tmp_path / "d.onnx"))
    pixels = torch.zeros(3, 160, 160)
    pixels[0, 32:128, 32:128] = 1  # more than the detector's face, from 96 to 224 of 320
    (face,) = reader.main(pixels)
    assert face.box == pytest.approx((48, 48, 112, 112))
    assert float(face.vector.norm()) == pytest.approx(1)
    (same,) = FaceReader(tmp_path / "r.onnx").find(pixels[:, 56:104, 56:104])
    assert float(face.vector @ same.vector) > 0.99
    (other,) = FaceReader(tmp_path / "r.onnx").find(pixels.flip(0))
    assert float(face.vector @ other.vector) < 0.9


def test_the_hint_has_the_vector_where_the_face_is(tmp_path):
    (face,) = FaceReader(write_recogniser(tmp_path / "r.onnx")).find(torch.rand(3, 64, 64), (32, 0, 32, 64))
    hint = identity_map((64, 96), [face])
    assert hint.shape == (512, 2, 3)
    assert torch.equal(hint[:, 0, 1], face.vector)
    assert not hint[:, :, (0, 2)].any()
    assert identity_map((64, 96), [face], spread=True).norm(dim=0).allclose(torch.ones(2, 3))


def test_alignment_maps_the_template_onto_the_landmarks():
    turned = np.array(TEMPLATE) @ np.array([[0.0, 2.0], [-2.0, 0.0]]) + 3  # a quarter turn, twice as large
    matrix = similarity(turned)
    ones = np.ones((5, 1))
    assert np.allclose(np.concatenate([np.array(TEMPLATE), ones], axis=1) @ matrix.T, turned)


def test_overlapping_boxes_are_suppressed():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]], dtype=np.float32)
    assert suppress(boxes, np.array([0.6, 0.9, 0.7])) == [1, 2]


def test_six_outputs_have_no_landmarks():
    levels = [(320 // stride) ** 2 * 2 for stride in (8, 16, 32)]
    outputs = [np.ones((n, 1), np.float32) for n in levels] + [np.ones((n, 4), np.float32) for n in levels]
    scores, boxes, points = decode_scrfd(outputs)
    assert len(scores) == len(boxes) == sum(levels)
    assert not points.size


def test_training_makes_a_map_for_every_picture(tmp_path):
    reader = FaceReader(write_recogniser(tmp_path / "r.onnx"), write_detector(tmp_path / "d.onnx"))
    hint = KINDS["identity"].make(
        torch.rand(2, 3, 160, 160), lambda: torch.full((2,), 0.5), Tools(faces=reader)
    )
    assert hint.shape == (2, 512, 5, 5)
    assert hint.any()


def test_what_is_missing_has_its_sentence(tmp_path, monkeypatch):
    good = write_recogniser(tmp_path / "r.onnx")
    with pytest.raises(CheckpointError, match=r"no face recogniser at .*absent\.onnx"):
        FaceReader(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(CheckpointError, match="no ONNX model"):
        FaceReader(tmp_path / "text.onnx")
    with pytest.raises(CheckpointError, match="gives 7 numbers"):
        FaceReader(write_recogniser(tmp_path / "seven.onnx", 7)).find(torch.rand(3, 64, 64))
    with pytest.raises(CheckpointError, match="1 outputs"):
        FaceReader(good, save_plain(tmp_path / "p.onnx")).find(torch.rand(3, 64, 64))
    with pytest.raises(RequestError, match="No face was found"):
        FaceReader(good, write_detector(tmp_path / "blind.onnx", 0.2)).main(torch.rand(3, 64, 64))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtra, match=r"onnxruntime: install it with `pip install 'triptych\[control\]'`"
    ):
        FaceReader(good)


def save_plain(path: Path) -> Path:
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], (1, 3, 320, 320), ["y"], {})
