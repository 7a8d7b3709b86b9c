"""The package imports with its core dependencies alone, and importing does nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = (
    "diffusers",
    "accelerate",
    "tensorboard",
    "scipy",
    "peft",
    "datasets",
    "sklearn",
    "psutil",
    "cv2",
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "torchmetrics",
    "torchao",
    "statsmodels",
    "choix",
    "playwright",
    "einops",
)

IMPORT_ALL = """
import importlib, pathlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
root = pathlib.Path({root!r})
for path in sorted((root / "triptych").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    importlib.import_module(".".join(part for part in parts if part != "__init__"))
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_module_imports_without_the_extras(tmp_path: Path) -> None:
    done = run(IMPORT_ALL.format(extras=EXTRAS, root=str(ROOT)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_package_itself_is_light(tmp_path: Path) -> None:
    code = "import sys, triptych; assert not {'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)"
    assert run(code, tmp_path).returncode == 0
