"""edgeattn: a compiler that takes lightweight attention models from PyTorch to the edge.

The public names are imported on first use, so that `import edgeattn` needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import Bundle as Bundle
    from edgeattn.errors import EdgeAttnError as EdgeAttnError
    from edgeattn.pipeline import export_model as export_model
    from edgeattn.session import Session as Session
    from edgeattn.session import load as load

__version__ = "0.1.0"
_HOMES = {
    "Bundle": "bundle",
    "EdgeAttnError": "errors",
    "Session": "session",
    "export_model": "pipeline",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeattn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edgeattn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
