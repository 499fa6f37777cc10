"""First stage: the PyTorch module in its deploy form, captured by torch.export with every op as one node."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from edgeattn.errors import EdgeAttnError, UnsupportedError
from edgeattn.tensors import Dim

# The shape of every input; a Dim with a name stays dynamic.
Shapes = Mapping[str, Sequence["int | Dim"]]


def deploy(module: nn.Module, align: int = 1) -> nn.Module:
    """Return the inference form of `module`: its own `deploy(align)` where it has one, else a copy in eval mode."""
    form = getattr(module, "deploy", None)
    deployed: nn.Module = form(align) if callable(form) else copy.deepcopy(module)
    return deployed.eval()


def trace(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], shapes: Shapes | None = None
) -> torch.export.ExportedProgram:
    """Capture `module` called with `inputs` in this order; a `Dim` in `shapes` stays dynamic.

    Example inputs must have size 2 or more in every dynamic dimension. Raises EA0301 when capture fails.
    """
    dims = tuple(_dynamic(shapes[name]) for name in inputs) if shapes else ()
    dynamic = dims if any(dims) else None
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, tuple(inputs.values()), dynamic_shapes=dynamic)
    except EdgeAttnError:
        raise
    except Exception as error:
        raise UnsupportedError(
            "EA0301",
            f"{type(module).__name__}: cannot be captured: {first_line(error)}",
            hints=["run with --debug for the full trace", *(["keep sizes fixed: leave out --dim"] if dynamic else [])],
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of the innermost cause, which is where torch says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes about packages that are not installed and torch's own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dynamic(shape: Sequence[int | Dim]) -> dict[int, torch.export.Dim]:
    return {
        axis: torch.export.Dim(dim.name, min=dim.min, max=dim.max)
        for axis, dim in enumerate(shape)
        if isinstance(dim, Dim) and dim.name
    }
