"""The PyTorch original kept in a bundle: a catalogue model with its weights, or an exported program."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.bundle import Bundle
from edgeattn.errors import IncompatibleError, UsageError
from edgeattn.packages import require

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

PROGRAM = "reference/model.pt2"
WEIGHTS = "reference/weights.safetensors"


def original(bundle: Bundle) -> nn.Module:
    """Return the float32 PyTorch module that `bundle` was made from, in eval mode, from hash-checked files.

    Raises EA0906 when the bundle was copied without `reference/`, EA0907 when the weights do not fit the model.
    """
    if PROGRAM in bundle.files and (bundle.path / PROGRAM).is_file():
        bundle.verify(PROGRAM)
        return load_program(bundle.file(PROGRAM)).module()
    if not (bundle.path / WEIGHTS).is_file():
        raise IncompatibleError(
            "EA0906",
            f"{bundle.path}: holds no PyTorch original (reference/ was left out of this copy)",
            hints=["use the bundle that export wrote"],
        )
    bundle.verify(WEIGHTS)
    return _catalogue(bundle)


def _catalogue(bundle: Bundle) -> nn.Module:
    require("torch")
    state = require("safetensors.torch").load_file(bundle.file(WEIGHTS))
    from edgeattn.model import MODELS

    variant = str(bundle.manifest["model"]["variant"])
    module = MODELS.get(variant).build()
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise IncompatibleError("EA0907", f"{bundle.path}: the weights do not fit {variant}", why=why) from error
    return module.eval()


def load_program(path: Path) -> ExportedProgram:
    """Return the exported program in a `.pt2` file without unpickling objects or running text from it.

    Raises EA0109 for a file that is no exported program, or that asks for either.
    """
    torch = require("torch")
    from edgeattn.op import OPS

    OPS.names()  # the program may call our operators: they must be defined before it is read
    try:
        _check_expressions(path)
        with _weights_only():
            program: ExportedProgram = torch.export.load(path)
    except UsageError:
        raise
    except Exception as error:
        why = str(error).strip().splitlines()
        raise UsageError("EA0109", f"{path}: not a readable exported program", why=why[0] if why else "") from error
    return program


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Forbid pickled objects: torch retries without this safeguard when plain tensors do not load."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_expressions(path: Path) -> None:
    """Refuse a program whose size expressions are more than sympy constructors: reading one evaluates it as Python."""
    with zipfile.ZipFile(path) as archive:
        documents = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")]
    for text in _expressions(documents):
        if not all(_harmless(node) for node in ast.walk(ast.parse(text, mode="eval").body)):
            raise UsageError("EA0109", f"{path}: holds a size expression that is not one: {text[:60]}")


def _expressions(document: Any) -> Iterator[str]:
    """Find every symbolic expression of a serialised program."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "expr_str" and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(document, list):
        for value in document:
            yield from _expressions(value)


def _harmless(node: ast.AST) -> bool:
    """Accept `Mul(Integer(32), Symbol('s5', positive=True))` and plain arithmetic on names."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or re.fullmatch(r"\w+", node.value) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id[:1].isupper()
    allowed = (ast.Name, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop)
    return isinstance(node, (*allowed, ast.cmpop, ast.boolop, ast.expr_context))
