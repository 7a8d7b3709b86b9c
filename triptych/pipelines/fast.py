"""What `fast` fills in where a request says nothing: nearly the same pictures for far less work.

docs/performance.md has how each setting was measured, alone and together.
"""

from __future__ import annotations

from typing import Any

# A Stage C file may carry a table `fast` of its own among its settings, which goes before this one.
FAST: dict[str, Any] = {
    "steps": 6,
    "guidance_interval": (0.4, 1.0),
    "decoder_steps": 3,
    "decoder_sampler": "dpmpp_2m",
    "decoder_reuse": 3,
}
