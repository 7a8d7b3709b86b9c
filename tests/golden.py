"""Compares triptych with recorded numbers: `python tests/golden.py FILE...`.

A recording is a safetensors file whose metadata says `kind`, `config` (JSON) and `tolerance` (JSON with
rtol and atol). It holds inputs (`in.`), weights (`w.`), and what a correct rebuild must give: outputs
(`out.`), gradients (`grad.`) and samples of weights made by formula (`check.`); a file with none of the
three is itself what must be given. Files that refer to others (the weights of `stage_c`, say) find them in
their own folder.

One line is printed for every output, with its largest error. The exit status is 1 if anything differs, was
not computed, or is of a kind that no check knows; the last line names what failed.

What computes the outputs stands in golden_checks/, one file per area: each has a dict CHECKS from kind to a
function that takes a `Golden` and returns the computed tensors by the name of the recorded one. For a
comparison whose expected value is not in the file under that name, it returns a pair (computed, expected).
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Computed = Mapping[str, Tensor | tuple[Tensor, Tensor]]
EXPECTED = ("out.", "grad.", "check.")


class Golden(Mapping[str, Tensor]):
    """One recording: a mapping from names to tensors with its metadata beside it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.kind: str = metadata.get("kind", "")
        self.config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
        tolerance = json.loads(metadata.get("tolerance", "{}"))
        self.rtol = float(tolerance.get("rtol", 0))
        self.atol = float(tolerance.get("atol", 0))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it: `under("w.")` are the weights."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def sibling(self, name: str) -> Golden:
        """The recording called `name` in the same folder."""
        return Golden(self.path.with_name(f"{name}.safetensors"))

    @property
    def expected(self) -> list[str]:
        """Names that must be computed."""
        names = [name for name in self.tensors if name.startswith(EXPECTED)]
        return sorted(names or self.tensors)


@dataclass(frozen=True)
class Outcome:
    """The comparison of one output. `error` is the largest absolute difference, None if there is none."""

    name: str
    passed: bool
    error: float | None
    remark: str = ""

    def line(self) -> str:
        error = "" if self.error is None else f"  max error {self.error:.3g}"
        return f"  {'ok  ' if self.passed else 'FAIL'} {self.name}{error}{self.remark and '  ' + self.remark}"


def load_checks() -> dict[str, Callable[[Golden], Computed]]:
    """All kinds that the files of golden_checks/ know."""
    checks: dict[str, Callable[[Golden], Computed]] = {}
    for path in sorted(Path(__file__).with_name("golden_checks").glob("[a-z]*.py")):
        checks |= importlib.import_module(f"golden_checks.{path.stem}").CHECKS
    return checks


def compare(name: str, got: Tensor, expected: Tensor, rtol: float, atol: float) -> Outcome:
    """allclose in float32, equality for integers; shapes must agree, NaN agrees with nothing."""
    if got.shape != expected.shape:
        return Outcome(name, False, None, f"shape {tuple(got.shape)}, recorded {tuple(expected.shape)}")
    if not expected.numel():
        return Outcome(name, True, 0.0)
    exact = not (got.is_floating_point() and expected.is_floating_point())
    got, expected = (x.detach().to("cpu", torch.float64 if exact else torch.float32) for x in (got, expected))
    passed = torch.equal(got, expected) if exact else torch.allclose(got, expected, rtol=rtol, atol=atol)
    return Outcome(name, passed, float((got - expected).abs().max()))


def check(golden: Golden, function: Callable[[Golden], Computed]) -> list[Outcome]:
    """Computes everything the recording expects and compares."""
    computed = function(golden)
    outcomes = []
    for name in sorted({*golden.expected, *computed}):
        value = computed.get(name)
        if value is None:
            outcomes.append(Outcome(name, False, None, "was not computed"))
        elif isinstance(value, tuple):
            outcomes.append(compare(name, *value, golden.rtol, golden.atol))
        elif name not in golden:
            outcomes.append(Outcome(name, False, None, "is not in the file"))
        else:
            outcomes.append(compare(name, value, golden[name], golden.rtol, golden.atol))
    return outcomes


def check_file(path: str | Path) -> list[Outcome]:
    """All outcomes of one file; an unreadable file, or a kind that no check knows, is a failed one."""
    try:
        golden = Golden(path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        return [Outcome("file", False, None, f"cannot be read: {error}")]
    checks = load_checks()
    if golden.kind not in checks:
        known = ", ".join(sorted(checks))
        return [Outcome("kind", False, None, f'"{golden.kind}" is unknown; known are {known}')]
    try:
        return check(golden, checks[golden.kind])
    except Exception as error:
        traceback.print_exc()
        return [Outcome("check", False, None, f"stopped: {type(error).__name__}: {error}")]


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python tests/golden.py FILE...", file=sys.stderr)
        return 2
    failed = []
    for path in paths:
        print(path)
        for outcome in check_file(path):
            print(outcome.line())
            if not outcome.passed:
                failed.append(f"{Path(path).name} {outcome.name}")
    print(f"failed: {', '.join(failed)}" if failed else "all equal within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
