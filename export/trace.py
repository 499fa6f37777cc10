"""First stage: the PyTorch module in its deploy form, captured by torch.export with every op as one node."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from edgeattn.errors import AccuracyError, EdgeAttnError, UnsupportedError
from edgeattn.tensors import Dim

_SPECIALIZED = re.compile(r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_ONE_SIZE = re.compile(r"^\s+(\w+) = (\d+)\s*$", re.MULTILINE)  # among the fixes torch suggests
_GUARD = re.compile(r"satisfy the generated guard (.*)\.")
_USER_LINE = re.compile(r'File "([^"]+)", line (\d+), in forward')
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
            # Deferred: guards that hold for every size but that sympy cannot prove would end a dynamic export.
            return torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes=dynamic,
                prefer_deferred_runtime_asserts_over_guards=dynamic is not None,
            )
    except EdgeAttnError:
        raise
    except Exception as error:
        raise _explain(error, type(module).__name__, dynamic is not None) from error


def _explain(error: Exception, name: str, dynamic: bool) -> EdgeAttnError:
    """Return our error for what torch.export said: the sizes it had to fix, or its first line with the user's line."""
    text = str(error)
    fixed = [f"{dim} = {size}" for dim, size in (*_SPECIALIZED.findall(text), *_ONE_SIZE.findall(text))]
    if fixed:
        listed = ", ".join(dict.fromkeys(fixed))
        return AccuracyError(
            "EA0703", f"{name}: dimensions were baked in: {listed}", hints=["leave out --dim for them"]
        )
    guards = [" ".join(guard.split()) for guard in _GUARD.findall(text)]
    if guards:
        return UnsupportedError(
            "EA0302", f"{name}: not every size of the range works: {guards[0]}", hints=["narrow the range of --dim"]
        )
    return UnsupportedError(
        "EA0301",
        f"{name}: cannot be captured: {first_line(error)}",
        where=", line ".join(next(iter(_USER_LINE.findall(text)), ())),
        hints=["run with --debug for the full trace", *(["keep sizes fixed: leave out --dim"] if dynamic else [])],
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the innermost cause, which is where torch says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch: notes about packages that are not installed, deprecations, and whole graphs when it fails."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic(shape: Sequence[int | Dim]) -> dict[int, torch.export.Dim]:
    return {
        axis: torch.export.Dim(dim.name, min=dim.min, max=dim.max)
        for axis, dim in enumerate(shape)
        if isinstance(dim, Dim) and dim.name
    }
