"""Low-rank changes of weights: what they add, and putting them into a network and taking them out again.

Four kinds, each with an optional magnitude (DoRA):

    lora   up @ down                                  [Hu 2021, eq. 3]
    loha   (w1_a @ w1_b) * (w2_a @ w2_b)              [Hyeon-Woo 2021, FedPara, eq. 2]
    lokr   kron(w1, w2), either of them a product     [Yeh 2023, LyCORIS, section 3.2]
    full   the difference itself

Every difference is taken from the untouched weight, so several files add up, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["lora", "loha", "lokr", "full"]
FACTORS: dict[str, tuple[str, ...]] = {
    "lora": ("down", "up"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"),
    "full": ("diff",),
}


@dataclass(frozen=True)
class Change:
    """What a file changes of one weight, the matrix `target` (a module's dotted name).

    `factors` are named as in FACTORS and have two axes. `third` is 0, 1 or 2 where only the rows of the
    query, key or value of a packed attention matrix are meant. `magnitude` (rows, 1) or (1, columns) gives
    every row or column of the changed weight its length [Liu 2024, DoRA, eq. 5].
    """

    target: str
    kind: Kind
    factors: Mapping[str, Tensor] = field(repr=False)
    scale: float = 1.0  # alpha / rank
    third: int | None = None
    magnitude: Tensor | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The inner side of its products; 0 where there is none."""
        inner = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w1_b", "w2_b"), "full": ()}[self.kind]
        return next((len(self.factors[name]) for name in inner if name in self.factors), 0)

    def product(self) -> Tensor:
        """The plain difference (rows, columns), float32, without magnitude and scale."""
        f = {name: tensor.float() for name, tensor in self.factors.items()}
        if self.kind == "lora":
            return f["up"] @ f["down"]
        if self.kind == "loha":
            return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
        if self.kind == "lokr":
            w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
            w2 = f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"]
            return torch.kron(w1, w2)
        return f["diff"]

    def shape(self) -> tuple[int, int]:
        """Rows and columns of the difference, found without computing it."""
        f = self.factors
        if self.kind == "lora":
            return f["up"].shape[0], f["down"].shape[1]
        if self.kind == "loha":
            return f["w1_a"].shape[0], f["w1_b"].shape[1]
        if self.kind == "lokr":
            rows = [f[name].shape[0] for name in ("w1", "w1_a", "w2", "w2_a") if name in f]
            columns = [f[name].shape[1] for name in ("w1", "w1_b", "w2", "w2_b") if name in f]
            return rows[0] * rows[1], columns[0] * columns[1]
        return f["diff"].shape[0], f["diff"].shape[1]

    def difference(self, weight: Tensor) -> Tensor:
        """What to add to `weight` (out, in[, 1, 1]), of the same shape, float32."""
        whole = weight.float().flatten(1)
        rows = whole if self.third is None else whole.chunk(3)[self.third]
        added = self.scale * self.product().to(rows.device)
        if self.magnitude is not None:
            length = self.magnitude.float().to(rows.device)
            changed = rows + added
            norm = torch.linalg.vector_norm(changed, dim=1 if length.shape[1] == 1 else 0, keepdim=True)
            added = changed * (length / norm) - rows
        if self.third is not None:
            parts = [torch.zeros_like(rows) for _ in range(3)]
            parts[self.third] = added
            added = torch.cat(parts)
        return added.reshape(weight.shape)


def merged(weight: Tensor, changes: Iterable[tuple[Change, float]]) -> Tensor:
    """`weight` with all `changes`, each times its strength; float32, a new tensor."""
    total = weight.float()
    for change, strength in changes:
        total = total + strength * change.difference(weight)
    return total


def merge(
    network: nn.Module, changes: Sequence[tuple[Change, float]], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Give `network` new weights for those that change; returns the old ones by name, for `put_back`.

    The old tensors are left as they are (they may be mapped from a file). New ones are as wide as the old
    and `dtype`. Strength 0 changes nothing.
    """
    together: dict[str, list[tuple[Change, float]]] = {}
    for change, strength in changes:
        if strength != 0:
            together.setdefault(f"{change.target}.weight", []).append((change, strength))
    before: dict[str, Tensor] = {}
    for name, wanted in together.items():
        old = network.get_parameter(name)
        before[name] = old.detach()
        wide = old.dtype if dtype is None else torch.promote_types(old.dtype, dtype)
        set_weight(network, name, merged(old.detach(), wanted).to(wide))
    return before


def put_back(network: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo `merge`: the same tensors as before, bit for bit."""
    for name, tensor in before.items():
        set_weight(network, name, tensor)


def set_weight(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter of a network, asking for gradients as the old one did."""
    path, _, last = name.rpartition(".")
    owner = network.get_submodule(path)
    wanted = owner._parameters[last]
    gradient = wanted is not None and wanted.requires_grad
    owner._parameters[last] = nn.Parameter(tensor, requires_grad=gradient)


def split_thirds(change: Change) -> list[Change]:
    """The same change of a packed attention matrix as three, for query, key and value; [change] if it is
    one of three already, or cannot be split (a Kronecker product whose rows do not divide, say)."""
    if change.third is not None or change.shape()[0] % 3:
        return [change]
    tall = {"lora": ("up",), "loha": ("w1_a", "w2_a"), "full": ("diff",)}.get(change.kind)
    if tall is None:
        tall = ("w1",) if "w1" in change.factors else ("w1_a",)
    if any(len(change.factors[name]) % 3 for name in tall):
        return [change]
    if change.magnitude is not None and len(change.magnitude) == 1:  # lengths of whole columns
        return [change]
    lengths = [None] * 3 if change.magnitude is None else change.magnitude.chunk(3)
    thirds = []
    for index in range(3):
        factors = {n: t.chunk(3)[index] if n in tall else t for n, t in change.factors.items()}
        thirds.append(replace(change, factors=factors, third=index, magnitude=lengths[index]))
    return thirds


def extract(target: str, before: Tensor, after: Tensor, rank: int) -> Change | None:
    """The nearest change of `rank` that turns `before` into `after` (out, in[, 1, 1]); None if they agree.

    The largest singular directions of the difference, their sizes shared evenly by both factors
    [Eckart and Young 1936].
    """
    difference = after.float().flatten(1) - before.float().flatten(1)
    if not bool(difference.any()):
        return None
    rank = min(rank, *difference.shape)
    left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
    root = sizes[:rank].sqrt()
    factors = {"up": left[:, :rank] * root, "down": root[:, None] * right[:rank]}
    return Change(target, "lora", {name: tensor.contiguous() for name, tensor in factors.items()})


class TokenTable(nn.Module):
    """A text tower's token table with some rows replaced or added: `ids` (n,) show `vectors` (n, width)."""

    ids: Tensor

    def __init__(self, table: nn.Module, ids: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("ids", ids, persistent=False)
        self.vectors = nn.Parameter(vectors)

    def forward(self, ids: Tensor) -> Tensor:  # (B, n) -> (B, n, width)
        known: Tensor = self.table.weight  # type: ignore[assignment]
        embedded: Tensor = self.table(ids.clamp(max=len(known) - 1))
        same = ids[..., None] == self.ids  # (B, n, k)
        own = self.vectors[same.int().argmax(-1)].to(embedded.dtype)
        return torch.where(same.any(-1, keepdim=True), own, embedded)
