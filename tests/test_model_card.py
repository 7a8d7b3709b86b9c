"""The model card's tables are filled from measured rows alone, and name the commands that measured them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from load_script import load_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def card() -> ModuleType:
    return load_script("model_card")


def write_rows(card: ModuleType, runs: Path) -> None:
    """Every measure that a table asks for, as `triptych evaluate` writes it."""
    for table in card.TABLES.values():
        for name, measure in card.MEASURE.findall(table):
            folder = runs / (
                "shapes" if name.removeprefix("shapes_") in ("single", "pairs", "heldout") else name
            )
            file = "shapes_single" if name.startswith("shapes_") and folder.name != "shapes" else name
            folder.mkdir(exist_ok=True)
            path = folder / f"{file}.json"
            held = json.loads(path.read_text()) if path.exists() else {"measures": {}, "numbers": {}}
            held["measures"][measure] = {"value": 0.25, "low": 0.125, "high": 0.5, "count": 100}
            path.write_text(json.dumps(held))


def test_rows_fill_every_place_of_both_tables(card: ModuleType, tmp_path: Path) -> None:
    write_rows(card, tmp_path)
    measured = card.read(tmp_path)
    for table in card.TABLES.values():
        text = card.fill(table, measured, 1)
        assert "{" not in text
        assert "25 % (12 to 50)" in text
    assert "| `triptych evaluate canny --data val.tar` |" in card.fill(card.CARD, measured, 1)
    assert "| `triptych evaluate icons --seeds 5` |" in card.fill(card.CARD, measured, 5)


def test_a_measure_that_is_missing_is_an_error(card: ModuleType, tmp_path: Path) -> None:
    write_rows(card, tmp_path)
    (tmp_path / "icons" / "icons.json").write_text('{"measures": {}, "numbers": {}}')
    with pytest.raises(KeyError):
        card.fill(card.CARD, card.read(tmp_path), 1)


def test_the_pages_have_their_places(card: ModuleType) -> None:
    for page in card.TABLES:
        text = (ROOT / "docs" / page).read_text()
        assert text.count("<!-- measured -->\n") == 1
        assert text.count("\n<!-- end of measured -->") == 1
