"""Measured tables go between the marks of a page and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from triptych.errors import RequestError
from triptych.evaluation.pages import put_table


def test_the_table_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- end of bench -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        put_table(page, "bench", "| new |")
    written = page.read_text(encoding="utf-8")
    assert written == "before\n<!-- bench -->\n\n| new |\n\n<!-- end of bench -->\nafter\n"
    put_table(page, "bench", None)
    assert page.read_text(encoding="utf-8") == written


@pytest.mark.parametrize("text", ["no table", "<!-- end of bench -->\n<!-- bench -->\n", None])
def test_a_page_without_a_place_is_named_and_left_alone(tmp_path: Path, text: str | None) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=r"page\.md (has no place|cannot be read)"):
        put_table(page, "bench", "| new |")
    assert not page.exists() or page.read_text(encoding="utf-8") == text
