"""Shared by all tests: one thread, fixed seeds, no network, and a tiny cascade with random weights."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from tiny_cascade import write_tiny_cascade

torch.set_num_threads(1)
# CI tries the same examples every time, so that a change is judged by what it changed.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole cascade in our own layout, a few kilobytes a part, weights random."""
    return write_tiny_cascade(tmp_path_factory.mktemp("tiny-cascade"))


@pytest.fixture(scope="session")
def narrow_cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cascade with its diffusion stages stored in bfloat16."""
    return write_tiny_cascade(tmp_path_factory.mktemp("narrow-cascade"), torch.bfloat16)
