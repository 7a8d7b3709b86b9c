"""The recorded official LoRA: its merged weights, the merged network's answer, and token offsets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from golden_checks.trunk import our_names, stage_c_config
from safetensors.torch import save_file
from torch import Tensor

from triptych.checkpoints.lora import read_lora, with_tokens
from triptych.models.lora import TokenTable, merge, put_back
from triptych.models.stage_c import StageC


def check_lora(golden: Any) -> dict[str, Any]:
    """Read as the file a user has; merge; look up tokens in a table of 12 rows."""
    base = golden.sibling("stage_c")
    network = StageC(stage_c_config(base.config))
    network.load_state_dict(our_names(base.under("w.")))
    network.eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    own = {
        name.removeprefix("w."): t for name, t in golden.items() if name.startswith(("w.weights", "w.emb"))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, path)
        lora = read_lora(path, {"stage_c": shapes})
        out: dict[str, Any] = {"adapters off": (answer(network, base), base["out.default"])}
        before = merge(network, [(change, 1.0) for change in lora.changes["stage_c"]])
        weights = network.state_dict()
        recorded = {name: name for name in golden.under("out.merged.")}
        out |= {f"out.merged.{name}": weights[ours] for ours, name in our_names(recorded).items()}
        out["out.default"] = out["out.merged_model"] = answer(network, base)
        put_back(network, before)
        out["adapters taken out"] = (answer(network, base), base["out.default"])
        out["out.token_vectors"] = token_vectors(golden, lora)
    return out


def answer(network: StageC, base: Any) -> Tensor:
    """The network's answer to the inputs of the recording `stage_c`."""
    with torch.no_grad():
        return network(
            base["in.x"], base["in.t"], base["in.text_hidden"], base["in.text_pooled"], base["in.image_embed"]
        )


def token_vectors(golden: Any, lora: Any) -> Tensor:
    """Offsets added to their rows of the recorded table, which already has a row for every token."""
    table = torch.nn.Embedding.from_pretrained(golden["w.table"])
    rows = lora.offsets.indices.tolist()
    new = {f"[{row}]": golden["w.table"][row] for row in rows}
    named = with_tokens(lora, golden["w.table"][: min(rows)], new)
    vectors = torch.cat([named.tokens[name] for name in new])
    return TokenTable(table, lora.offsets.indices, vectors)(golden["in.token_ids"]).detach()


CHECKS = {"lora": check_lora}
