"""A weight file, read as data: PyTorch or safetensors by its content, whatever its name, and nothing in it is run."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import EdgeAttnError, MissingError, UsageError
from edgeattn.hashing import hash_file
from edgeattn.packages import require

# Tried after the authors' own names: what training scripts in general call the state dict, averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model_state_dict", "model", "net_E", "net")
_SCALAR = np.float64(0).__reduce__()[0]
# Plain data that training scripts store beside the weights; unpickling these runs nothing.
_DATA_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # written by numpy 1
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def checkpoint_sha256(path: Path) -> str:
    """Return the SHA-256 of a weight file. Raises EA0120 where there is none, EA0202 when it may not be read."""
    if path.is_dir():
        raise UsageError("EA0120", f"{path}: a folder, not a weight file")
    try:
        return hash_file(path)
    except FileNotFoundError:
        raise UsageError("EA0120", f"{path}: no such weight file") from None
    except PermissionError:
        raise MissingError("EA0202", f"{path}: no permission to read this weight file") from None
    except OSError as error:
        raise UsageError("EA0120", f"{path}: cannot be read: {error.strerror or error}") from None


def read_checkpoint(path: Path, wrappers: Sequence[str] = ()) -> tuple[str, Mapping[str, Any]]:
    """Return the key that held the state dict ("" when the file is one) and its entries, not all of them tensors.

    `wrappers` are the authors' names for it, tried first. Raises EA0121 for a damaged or foreign file, EA0122 for one
    that holds something else or needs code to be read.
    """
    try:
        content = _read(path)
    except EdgeAttnError:
        raise
    except Exception as error:  # damaged bytes can make a reader raise nearly anything
        raise _damaged(path, f"{type(error).__name__}: {_reason(error)}") from error
    return _unwrap(content, wrappers, path)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04":
        _check_archive(path)
        return _read_torch(path)
    if head[:1] == b"\x80":
        return _read_torch(path)
    if head[8:] == b"{":
        return _read_safetensors(path)
    found = "an empty file" if not head else "a web page" if head[:1] == b"<" else "neither PyTorch nor safetensors"
    raise UsageError("EA0121", f"{path}: {found}, not weights", hints=["download the weight file itself again"])


def _check_archive(path: Path) -> None:
    """Refuse an archive of something else, and one with a damaged entry: torch.load compares no checksum."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any("/code/" in name or name.endswith("/archive_format") for name in names):
            raise UsageError("EA0122", f"{path}: a saved program (TorchScript or .pt2), not weights")
        if not any(name.endswith("/data.pkl") for name in names):
            raise UsageError("EA0122", f"{path}: an archive without PyTorch weights")
        broken = archive.testzip()
    if broken:
        raise _damaged(path, f"the checksum of its entry {broken} does not hold")


def _read_safetensors(path: Path) -> Any:
    return require("safetensors.torch").load_file(path)


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_DATA_TYPES):
            warnings.simplefilter("ignore")  # remarks on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if code is None:
            raise
        raise UsageError(
            "EA0122",
            f"{path}: holds more than weights: reading it would run {code[1]}, and nothing in a weight file is run",
            hints=["if you trust the file, write its state dict alone to a new one with torch.save or safetensors"],
        ) from None


def _unwrap(content: Any, wrappers: Sequence[str], path: Path) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        raise UsageError("EA0122", f"{path}: holds a {type(content).__name__}, not a state dict")
    for wrapper in (*wrappers, *_WRAPPERS):
        if _has_tensors(content.get(wrapper)):
            return wrapper, content[wrapper]
    if _has_tensors(content):
        return "", content
    keys = ", ".join(map(str, list(content)[:8])) or "none"
    raise UsageError("EA0122", f"{path}: no state dict in it; its entries: {keys}")


def _has_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _damaged(path: Path, why: str) -> UsageError:
    hint = "compare its size and sha256 with the publisher's, and download it again"
    return UsageError("EA0121", f"{path}: a truncated or corrupt weight file", why=why, hints=[hint])


def _reason(error: Exception) -> str:
    """Return the first telling line of a reader's message."""
    text = str(error)
    lines = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()
    return lines[0].partition(". ")[0][:160] if lines else ""
