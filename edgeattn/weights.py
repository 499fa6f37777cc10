"""Weights of a PyTorch original: seeded by rule, or loaded from the authors' file with every difference named."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.checkpoint import checkpoint_sha256, read_checkpoint
from edgeattn.errors import UsageError
from edgeattn.model import MODELS, Checkpoint
from edgeattn.seeding import seeded_value

_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


@dataclass(frozen=True)
class Loaded:
    """What was found in a weight file, entry by entry; a strict load has at most `ignored` and `reshaped` entries.

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
        """Return one line per kind of difference with its entries, the first `limit` of them when it is positive."""
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
        digest.update(entry.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(
    module: nn.Module, path: str | Path, checkpoint: Checkpoint, *, allow_partial: bool = False
) -> Loaded:
    """Load the weights at `path` into `module`: a PyTorch or safetensors file laid out as `checkpoint` says.

    Strict unless `allow_partial`, which takes what fits and seeds the rest. The module is untouched on failure.
    Raises EA0120 to EA0122 for a file that cannot be used, EA0123 for one that belongs to another model.
    """
    loaded, state = _compare(module, Path(path), checkpoint)
    if not loaded.fits and not (allow_partial and loaded.matched):
        raise _misfit(loaded, path)
    if not loaded.fits:
        seed_weights(module)
    module.load_state_dict(state, strict=loaded.fits)
    return loaded


def check_weights(model_name: str, path: str | Path) -> Loaded:
    """Compare the file at `path` with the state dict of a catalogue model, loading nothing."""
    model = MODELS.get(model_name)
    return _compare(model.build(), Path(path), model.checkpoint)[0]


def _compare(module: nn.Module, path: Path, checkpoint: Checkpoint) -> tuple[Loaded, dict[str, Tensor]]:
    """Return the comparison and the entries that fit."""
    sha256 = checkpoint_sha256(path)
    wrapper, content = read_checkpoint(path, checkpoint.wrappers)
    expected = module.state_dict()
    content = _without_prefix(content, expected)
    ignored = {key for key, value in content.items() if _is_ignored(key, value, expected, checkpoint.ignore)}
    found: dict[str, Tensor] = {key: value for key, value in content.items() if key not in ignored}
    fitting = {key: _fit(found[key], wanted) for key, wanted in expected.items() if key in found}
    state = {key: value for key, value in fitting.items() if value is not None}
    other_shape = [key for key in fitting if key not in state]
    loaded = Loaded(
        file=path.name,
        sha256=sha256,
        wrapper=wrapper,
        matched=len(state),
        ignored=tuple(sorted(ignored)),
        reshaped=tuple(key for key, value in state.items() if value.shape != found[key].shape),
        missing=tuple(key for key in expected if key not in found),
        unexpected=tuple(key for key in found if key not in expected),
        mismatched=tuple(f"{key} {_describe(found[key])} for {_describe(expected[key])}" for key in other_shape),
    )
    return loaded, state


def _without_prefix(content: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Drop what a wrapper module put before every key."""
    entries = {str(key): value for key, value in content.items()}
    for prefix in _PREFIXES:
        if not any(key.startswith(prefix) for key in expected):
            entries = {key.removeprefix(prefix): value for key, value in entries.items()}
    return entries


def _is_ignored(key: str, value: Any, expected: Mapping[str, Tensor], patterns: Sequence[str]) -> bool:
    """Pass over what is no tensor, and extra entries whose whole key or last component the checkpoint lists."""
    names = (key, key.rpartition(".")[2])
    listed = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)
    return not isinstance(value, Tensor) or (listed and key not in expected)


def _fit(value: Tensor, expected: Tensor) -> Tensor | None:
    """Return `value` if it can stand for `expected`: same shape, or a matrix that became a 1x1 convolution."""
    if value.is_floating_point() != expected.is_floating_point():
        return None
    if value.shape == expected.shape:
        return value
    return value[..., None, None] if value.ndim == 2 and (*value.shape, 1, 1) == tuple(expected.shape) else None


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{kind}"


def _misfit(loaded: Loaded, path: str | Path) -> UsageError:
    hints = ["edgeattn models check MODEL FILE lists every difference"]
    hints += ["--allow-partial takes what fits and seeds the rest"] if loaded.matched else []
    return UsageError(
        "EA0123",
        f"{path}: does not fit the model: {loaded.summary()}",
        where=f'entry "{loaded.wrapper}" of the file' if loaded.wrapper else "",
        why="\n         ".join(loaded.differences(limit=4)),
        hints=hints,
    )


def _shorten(names: Sequence[str], limit: int) -> str:
    shown = names[:limit] if limit else names
    return ", ".join(shown) + (f", ... and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
