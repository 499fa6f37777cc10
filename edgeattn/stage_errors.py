"""Values of a detector's stage from two runs: which belongs to which, brought into one order, and their error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_CHUNK = 1 << 22
_PROBLEMS_KEPT = 3
# Two proposals are the same when no channel differs by more of its deviation; half precision stays far below.
_SAME = 0.05


@dataclass
class StageError:
    """Running error of the value `name` of a stage: its scaled error over all samples. Large maps are read in parts."""

    stage: str
    name: str
    integer: bool
    samples: int = 0
    abs_max: float = 0.0
    worst_sample: str = ""
    problems: list[str] = field(default_factory=list)
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))  # error^2, reference^2
    _worst: float = -1.0

    def update(self, sample: str, expected: Array, found: Array) -> None:
        """Add one sample; another shape, and what is not finite, makes the error infinite."""
        self.samples += 1
        if expected.shape != found.shape and len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(f"{sample}: shape {list(found.shape)}, expected {list(expected.shape)}")
        sums, largest = _sums(expected, found)
        self._sums += sums
        self.abs_max = max(self.abs_max, largest)
        if _scaled(*sums) > self._worst:
            self._worst, self.worst_sample = _scaled(*sums), sample

    def metrics(self) -> dict[str, Any]:
        """Return the figures so far, as they stand in a report (see `schema_validate.json`)."""
        return {
            "stage": self.stage,
            "name": self.name,
            "integer": self.integer,
            "samples": self.samples,
            "scaled_err": _scaled(*self._sums),
            "abs_max": self.abs_max,
            "problems": self.problems,
            "worst_sample": self.worst_sample,
        }


def scaled_error(expected: Array, found: Array) -> float:
    """Return RMS error over RMS reference: infinite for another shape and for what is not finite."""
    return _scaled(*_sums(expected, found)[0])


def pair(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, str]:
    """Return which of `found` is which of `expected`, by name: alike in kind and sizes, the nearest first.

    What a stage hands on unchanged has no value of its own in a graph, and is left out.
    """
    candidates = [
        (scaled_error(*_rows(value, other)), label, name)
        for label, value in expected.items()
        for name, other in found.items()
        if _kind(value) == _kind(other)
    ]
    pairs: dict[str, str] = {}
    for _, label, name in sorted(candidates, key=lambda entry: entry[0]):
        if label not in pairs and name not in pairs.values():
            pairs[label] = name
    return {label: pairs[label] for label in expected if label in pairs}


def comparable(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Return the values that both have, by name: rows of real voxels only, and proposals in one order."""
    both = {label: _rows(value, found[label]) for label, value in expected.items() if label in found}
    listed = {label: sides for label, sides in both.items() if _is_list(*sides)}
    if len(listed) > 1 and len({value.shape[2] for value, _ in listed.values()}) == 1:
        mine, theirs = (np.concatenate([sides[i][0] for sides in listed.values()]) for i in range(2))
        order = _proposals(mine.astype(np.float64), theirs.astype(np.float64))
        if 2 * len(order[0]) >= mine.shape[1]:
            both |= {label: (ours[..., order[0]], other[..., order[1]]) for label, (ours, other) in listed.items()}
    return both


def _proposals(expected: Array, found: Array) -> tuple[Array, Array]:
    """Return the columns of [channels, p] that are each other's nearest: rounding swaps them in their ranking."""
    scale = expected.std(1, keepdims=True)
    scale[scale == 0] = 1.0
    apart = np.abs((expected[:, :, None] - found[:, None]) / scale[..., None]).max(0)
    nearest, back = apart.argmin(1), apart.argmin(0)
    columns = np.flatnonzero(back[nearest] == np.arange(len(nearest)))
    columns = columns[apart[columns, nearest[columns]] <= _SAME]
    return columns, nearest[columns]


def _is_list(expected: Array, found: Array) -> bool:
    """Return whether this is [1, channels, p]: a quantity of p proposals."""
    return expected.ndim == 3 and expected.shape == found.shape and len(expected) == 1


def _rows(expected: Array, found: Array) -> tuple[Array, Array]:
    """Leave out the spare row that ends a sparse tensor, which holds anything, and what a graph has room for."""
    if expected.ndim != 2 or found.ndim != 2:
        return expected, found
    rows = min(len(expected), len(found)) - 1
    return expected[:rows], found[:rows]


def _kind(array: Array) -> tuple[bool, tuple[int, ...]]:
    """Return whether these are integers, and the sizes that do not depend on the cloud."""
    return array.dtype.kind in "iub", array.shape[1:] if array.ndim > 1 else array.shape


def _sums(expected: Array, found: Array) -> tuple[NDArray[np.float64], float]:
    """Return the sums of squares of error and reference, and the largest difference."""
    bad = np.array([math.inf, 1.0]), math.inf
    if expected.shape != found.shape:
        return bad
    sums, largest = np.zeros(2), 0.0
    mine, theirs = expected.reshape(-1), found.reshape(-1)
    for start in range(0, mine.size, _CHUNK):
        wanted = mine[start : start + _CHUNK].astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.abs(theirs[start : start + _CHUNK].astype(np.float64) - wanted)
        if not np.isfinite(difference).all():
            return bad
        largest = max(largest, float(difference.max()))
        sums += ((difference**2).sum(), (wanted**2).sum())
    return sums, largest


def _scaled(error: float, reference: float) -> float:
    return math.sqrt(error / reference) if reference else (math.inf if error else 0.0)
