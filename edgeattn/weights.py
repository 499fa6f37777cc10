"""Weights of a PyTorch original: seeded by rule, or read from the authors' file without running any of it."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.errors import EdgeAttnError, MissingError, UsageError
from edgeattn.model import MODELS, Checkpoint
from edgeattn.seeding import seeded_value

State = dict[str, Tensor]

# Tried after the authors' own names: what training scripts in general call the state dict, averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model_state_dict", "model", "net_E", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# Plain data that training scripts store beside the weights; unpickling these runs nothing.
_DATA_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype("float32")),
    type(np.dtype("float64")),
    type(np.dtype("int64")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class Loaded:
    """What was found in a weight file, entry by entry; only `ignored` and `reshaped` may be non-empty in a strict load.

    `sha256` is that of the file, `wrapper` the key that held the state dict ("" when nothing did); `mismatched` names
    each entry with both shapes; `matched` is the number of entries that were taken.
    """

    file: str
    sha256: str
    wrapper: str
    matched: int
    ignored: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Say whether every entry of the model was found and nothing else."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """Return one line: "2 missing, 1 of another shape; 512 fit"."""
        counts = ((self.missing, "missing"), (self.unexpected, "unexpected"), (self.mismatched, "of another shape"))
        differences = ", ".join(f"{len(names)} {what}" for names, what in counts if names) or "no difference"
        return f"{differences}; {self.matched} fit"

    def differences(self, limit: int = 0) -> list[str]:
        """Return one line per kind of difference with its entries, at most `limit` of them when it is positive."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("other shape", self.mismatched))
        return [f"{kind} ({len(names)}): {_shorten(names, limit)}" for kind, names in kinds if names]


def seed_weights(module: nn.Module) -> None:
    """Give `module` the deterministic weights of its state-dict keys; integers and fixed filters stay."""
    with torch.no_grad():
        for key, entry in module.state_dict().items():
            value = seeded_value(key, entry.shape) if entry.is_floating_point() else None
            if value is not None:
                entry.copy_(torch.from_numpy(value))


def state_sha256(module: nn.Module) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of the state dict, in its order."""
    digest = hashlib.sha256()
    for key, entry in module.state_dict().items():
        digest.update(f"{key} {entry.dtype} {list(entry.shape)}\n".encode())
        flat = entry.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(
    module: nn.Module, path: str | Path, checkpoint: Checkpoint, *, allow_partial: bool = False
) -> Loaded:
    """Load the weights at `path` into `module`: a PyTorch or safetensors file laid out as `checkpoint` says.

    Strict unless `allow_partial`, which takes what fits and seeds the rest. The module is untouched on failure.
    Raises EA0120 to EA0122 for a file that cannot be used, EA0123 for one that belongs to another model.
    """
    loaded, state = _compare(module, Path(path), checkpoint)
    if not loaded.fits and (not allow_partial or not loaded.matched):
        raise _misfit(loaded, type(module).__name__)
    if not loaded.fits:
        seed_weights(module)
    module.load_state_dict(state, strict=loaded.fits)
    return loaded


def check_weights(model_name: str, path: str | Path) -> Loaded:
    """Compare the file at `path` with the state dict of a catalogue model, loading nothing."""
    model = MODELS.get(model_name)
    return _compare(model.build(), Path(path), model.checkpoint)[0]


def _compare(module: nn.Module, path: Path, checkpoint: Checkpoint) -> tuple[Loaded, State]:
    """Return the comparison and the entries that fit."""
    sha256 = _sha256(path)
    wrapper, entries = _unwrap(_read(path), checkpoint.wrappers, path)
    expected = module.state_dict()
    found = _without_prefix(entries, expected)
    ignored = [key for key in found if key not in expected and _is_ignored(key, checkpoint.ignore)]
    fitting = {key: _fit(value, expected[key]) for key, value in found.items() if key in expected}
    state = {key: value for key, value in fitting.items() if value is not None}
    loaded = Loaded(
        file=path.name,
        sha256=sha256,
        wrapper=wrapper,
        matched=len(state),
        ignored=tuple(ignored),
        reshaped=tuple(key for key, value in state.items() if value.shape != found[key].shape),
        missing=tuple(key for key in expected if key not in found),
        unexpected=tuple(key for key in found if key not in expected and key not in set(ignored)),
        mismatched=tuple(
            f"{key} {_describe(found[key])} for {_describe(expected[key])}" for key in fitting if key not in state
        ),
    )
    return loaded, state


def _sha256(path: Path) -> str:
    if path.is_dir():
        raise UsageError("EA0120", f"{path}: a folder, not a weight file")
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UsageError("EA0120", f"{path}: no such weight file") from None
    except PermissionError:
        raise MissingError("EA0220", f"{path}: no permission to read this weight file") from None
    except OSError as error:
        raise UsageError("EA0120", f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _read(path: Path) -> Any:
    """Return what the file holds; its content decides the format, never its name."""
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise UsageError("EA0121", f"{path}: an empty file, not weights")
    if head[:1] == b"<":
        raise UsageError("EA0121", f"{path}: a web page, not weights", hints=["download the file itself"])
    try:
        return _read_safetensors(path) if head[8:9] == b"{" else _read_torch(path)
    except EdgeAttnError:
        raise
    except Exception as error:  # damaged bytes can make a reader raise nearly anything
        reason = str(error).strip().split("\n")[0][:200]
        raise UsageError(
            "EA0121",
            f"{path}: truncated or corrupt, or not a PyTorch or safetensors file",
            why=f"{type(error).__name__}: {reason}",
            hints=["compare its size and sha256 with the publisher's, and download it again"],
        ) from error


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    state: State = load_file(path)
    return state


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_DATA_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"Unsupported (?:global|class|operand)[^\n]*?GLOBAL (\S+)", str(error), re.IGNORECASE)
        if code is None:
            raise
        raise UsageError(
            "EA0122",
            f"{path}: holds more than weights: it wants to run {code[1]}, and weights are read without running code",
            hints=["where you trust the file: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"],
        ) from None


def _unwrap(content: Any, wrappers: Sequence[str], path: Path) -> tuple[str, State]:
    """Return the key that holds the state dict, and its tensors; the file itself may be one."""
    if not isinstance(content, Mapping):
        raise UsageError("EA0122", f"{path}: holds a {type(content).__name__}, not a state dict")
    for wrapper in (*wrappers, *_WRAPPERS):
        if state := _tensors(content.get(wrapper)):
            return wrapper, state
    if state := _tensors(content):
        return "", state
    keys = _shorten([str(key) for key in content], 8) or "none"
    raise UsageError("EA0122", f"{path}: no state dict in it; its entries: {keys}")


def _tensors(content: Any) -> State:
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(entries: State, expected: Mapping[str, Tensor]) -> State:
    """Drop what a wrapper module put before every key."""
    for prefix in _PREFIXES:
        if not any(key.startswith(prefix) for key in expected):
            entries = {key.removeprefix(prefix): value for key, value in entries.items()}
    return entries


def _is_ignored(key: str, patterns: Sequence[str]) -> bool:
    """Match the whole key against a pattern, or its last component against a name."""
    return any(fnmatch.fnmatchcase(key, pattern) or key.rpartition(".")[2] == pattern for pattern in patterns)


def _fit(value: Tensor, expected: Tensor) -> Tensor | None:
    """Return `value` if it can stand for `expected`: same shape, or a matrix that became a 1x1 convolution."""
    if value.is_floating_point() != expected.is_floating_point():
        return None
    if value.shape == expected.shape:
        return value
    return value[..., None, None] if (*value.shape, 1, 1) == tuple(expected.shape) and value.ndim == 2 else None


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{kind}"


def _misfit(loaded: Loaded, model: str) -> UsageError:
    return UsageError(
        "EA0123",
        f"{loaded.file}: weights of another model than {model}: {loaded.summary()}",
        where=f"{loaded.file}: {loaded.wrapper}" if loaded.wrapper else "",
        why="\n         ".join(loaded.differences(limit=4)),
        hints=[
            "edgeattn models check MODEL FILE lists every difference",
            *(["--allow-partial takes what fits and seeds the rest"] if loaded.matched else []),
        ],
    )


def _shorten(names: Sequence[str], limit: int) -> str:
    shown = names[:limit] if limit else names
    return ", ".join(shown) + (f", ... and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
