"""What tests of the pipelines share."""

from __future__ import annotations

from typing import Any

import pytest

from triptych.pipelines.speed import Branches


@pytest.fixture
def branch_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches of guidance were asked for, call by call."""
    counts: list[int] = []
    plain = Branches.__call__

    def counted(self: Branches, x: Any, t: Any, branches: Any) -> Any:
        counts.append(len(branches))
        return plain(self, x, t, branches)

    monkeypatch.setattr(Branches, "__call__", counted)
    return counts
