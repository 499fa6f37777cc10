"""Optional packages: a missing one is named together with the extra that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from edgeattn.errors import MissingError

# Import name to extra; `gpu` brings the same as `cpu`, with the CUDA builds.
EXTRAS = {
    "torch": "cpu",
    "onnx": "cpu",
    "onnx_ir": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "safetensors": "cpu",
    "PIL": "cpu",
    "triton": "cpu",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "jinja2": "report",
    "matplotlib": "report",
}


def require(name: str) -> ModuleType:
    """Import and return the optional package `name`, or raise EA0201 with the extra to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        known = missing(error)
        if known is None:
            raise
        raise known from error


def missing(error: ModuleNotFoundError) -> MissingError | None:
    """Return the error a user can act on when an optional package is what is missing, else None."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingError("EA0201", f"{package} is not installed", hints=[f"pip install 'edgeattn[{EXTRAS[package]}]'"])
