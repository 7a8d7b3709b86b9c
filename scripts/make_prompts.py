"""Write the prompt sets of `triptych evaluate` from the validation shards.

    python scripts/make_prompts.py --icons DIR

DIR holds shapes-val.tar and val.tar. Choices are seeded; the concepts are those of the icon judge.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from triptych.data.shards import Sample, ShardIndex
from triptych.evaluation.icon_judge import load_judge

PER_SET = 100
OUT = Path(__file__).parents[1] / "triptych" / "evaluation" / "prompt_sets"
STATED = ("left of", "right of", "above", "below", "left to right", "top to bottom")
STATED_OF_ALIKE = ("side by side", "in a row", "in a column", "one above the other")


def shapes_row(sample: Sample, caption: str) -> dict[str, Any]:
    """A caption with only what it states."""
    meta = sample.meta
    stated = any(phrase in caption for phrase in STATED + STATED_OF_ALIKE)
    return {
        "prompt": caption,
        "objects": [{"shape": o["shape"], "colour": o["colour"]} for o in meta["objects"]],
        "relations": meta["relations"] if stated else [],
        "background": meta["background"] if "background" in caption else None,
        "kind": meta["kind"],
        "subset": meta["subset"],
        "key": sample.key,
    }


def choose(samples: list[Sample], name: str, usable: Any) -> list[dict[str, Any]]:
    """The main caption of each sample, then further ones, until the set is full; in a seeded order."""
    rng = random.Random(name)
    samples = list(samples)
    rng.shuffle(samples)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        for sample in samples:
            captions = [c for c in sample.captions if usable(c)]
            if number < len(captions) and len(rows) < PER_SET:
                rows.append(shapes_row(sample, captions[number]))
    return rows


def write(name: str, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    (OUT / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{name}: {len(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="folder with the shards of the icon set")
    folder: Path = parser.parse_args().icons
    OUT.mkdir(exist_ok=True)

    shapes = list(ShardIndex(folder / "shapes-val.tar"))
    seen = [s for s in shapes if s.meta["subset"] == "in_distribution"]
    singles = [s for s in seen if s.meta["kind"] == "single"]
    pairs = [s for s in seen if s.meta["kind"] == "pair"]
    write("shapes_single", choose(singles, "single", lambda c: c.startswith(("a ", "an "))))
    write("shapes_pairs", choose(pairs, "pairs", lambda c: any(phrase in c for phrase in STATED)))
    heldout = [s for s in shapes if s.meta["subset"] == "heldout_composition"]
    write("shapes_heldout", choose(heldout, "heldout", lambda c: True))
    write("shapes_val", [shapes_row(s, s.caption) for s in shapes])

    concepts = set(load_judge().concepts)
    icons = [s for s in ShardIndex(folder / "val.tar") if s.meta["concept"] in concepts]
    rows = [
        {"prompt": s.caption, "concept": s.meta["concept"], "style": s.meta["style"], "key": s.key}
        for s in icons
    ]
    write("icons_val", rows)
    random.Random("icons").shuffle(rows)
    first = {row["concept"]: row for row in reversed(rows)}
    write("icons_100", [first[concept] for concept in sorted(first)])


if __name__ == "__main__":
    main()
