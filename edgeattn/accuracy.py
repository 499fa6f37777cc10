"""Accuracy: metrics of one output over a stream of samples, and the band that a healthy export stays in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# PyTorch's own error at the precision is multiplied by this: another order of summation costs a small factor, a wrong
# operator costs orders of magnitude.
FACTOR = 4.0
# The share of a detector's boxes that must be there: rounding alone swaps a few at the cut of the ranking.
MATCHED = 0.99
# Scaled error below which rounding alone explains a difference. Half precision: half a unit in the last place.
FLOORS = {"fp64": 1e-12, "fp32": 5e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}

# Histogram of |error| / RMS of the sample's reference: quarter decades from 1e-12 to 1e2.
LOG_LOW, LOG_HIGH, LOG_STEP = -12.0, 2.0, 0.25
_BINS = round((LOG_HIGH - LOG_LOW) / LOG_STEP)
_FEWEST_CLASSES = 10
_PROBLEMS_KEPT = 3


@dataclass(frozen=True)
class Band:
    """The largest scaled error, or the least share of boxes, that passes, and where the figure comes from."""

    limit: float
    source: str


EXACT = Band(0.0, "integers are exact")


def band(precision: str, reference_error: float | None = None) -> Band:
    """Return max(floor, 4 x d): `d` is the scaled error of PyTorch itself at `precision` ("fp32", "fp16", "bf16").

    float32 has no `d` (PyTorch in float32 is the reference), so its band is the floor.
    """
    floor = FLOORS[precision]
    derived = 0.0 if reference_error is None else FACTOR * reference_error
    if derived > floor:
        return Band(derived, f"{FACTOR:g} x torch {precision} error {reference_error:.2g}")
    return Band(floor, f"floor of {precision}")


def least_share(precision: str, reference_share: float | None = None) -> Band:
    """Return min(0.99, 1 - 4 x (1 - s)): `s` is the share of boxes that PyTorch itself keeps at `precision`."""
    loss = 0.0 if reference_share is None else 1 - reference_share
    if 1 - FACTOR * loss < MATCHED:
        return Band(max(0.0, 1 - FACTOR * loss), f"{FACTOR:g} x torch {precision} loss {loss:.2g}")
    return Band(MATCHED, "rounding alone swaps a few")


@dataclass
class Comparison:
    """Running metrics of the output `name`: feed `update` one sample at a time, read `metrics` at any time.

    Memory stays constant but for one float per sample. Elements that are not finite count as NaN or Inf and are left
    out of the sums; a wrong shape or dtype is a problem. Both fail whatever the other figures say.
    """

    name: str
    dtype: str
    classify: bool = False
    samples: int = 0
    problems: list[str] = field(default_factory=list)
    nan: int = 0
    inf: int = 0
    reference_nonfinite: int = 0
    abs_max: float = 0.0
    errors: list[float] = field(default_factory=list)
    worst_sample: str = ""
    worst_index: list[int] = field(default_factory=list)
    worst_top5: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    exact: int = 0
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))  # error^2, reference^2, found^2, product
    _worst: float = -1.0
    _agreement: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))  # top-1, top-5, rows

    def update(self, sample: str, reference: NDArray[Any], found: NDArray[Any]) -> bool:
        """Add one sample (any shape; batch first) and return whether it is the worst so far."""
        self.samples += 1
        mismatch = self._mismatch(reference, found)
        if mismatch:
            self._refuse(f"{sample}: {mismatch}")
        if reference.shape != found.shape:
            return self._rank(sample, math.inf, ())
        if not reference.size:
            return self._rank(sample, 0.0, ())
        expected, actual = np.asarray(reference, np.float64), np.asarray(found, np.float64)
        finite = np.isfinite(expected) & np.isfinite(actual)
        self.nan += int(np.isnan(actual).sum())
        self.inf += int(np.isinf(actual).sum())
        self.reference_nonfinite += int(expected.size - np.isfinite(expected).sum())
        difference, error = self._accumulate(np.where(finite, expected, 0.0), np.where(finite, actual, 0.0))
        self._agree(expected, actual)
        position, error = (difference.argmax(), error) if finite.all() else (finite.argmin(), math.inf)
        worst = self._rank(sample, error, np.unravel_index(position, expected.shape))
        if worst and self.classify:
            self.worst_top5 = (_best(expected), _best(actual))
        return worst

    def metrics(self) -> dict[str, Any]:
        """Return the figures so far, as they stand in a report (see `schema_validate.json`)."""
        error, reference, found, product = self._sums
        top1, top5, rows = self._agreement.tolist()
        return {
            "name": self.name,
            "dtype": self.dtype,
            "samples": self.samples,
            "scaled_err": _scaled(error, reference) if self.samples else math.nan,
            "abs_max": self.abs_max,
            "cosine": _cosine(product, reference, found),
            "snr_db": 10 * math.log10(reference / error) if error and reference else (math.nan if error else math.inf),
            "top1": top1 / rows if rows else None,
            "top5": top5 / rows if rows else None,
            "rows": rows,
            "nan": self.nan,
            "inf": self.inf,
            "reference_nonfinite": self.reference_nonfinite,
            "problems": self.problems,
            "worst_sample": self.worst_sample,
            "worst_index": self.worst_index,
            "worst_top5": {"reference": self.worst_top5[0], "found": self.worst_top5[1]},
            "histogram": {
                "log10_low": LOG_LOW,
                "log10_step": LOG_STEP,
                "exact": self.exact,
                "counts": self.histogram.tolist(),
            },
        }

    def _mismatch(self, reference: NDArray[Any], found: NDArray[Any]) -> str:
        if reference.shape != found.shape:
            return f"shape {list(found.shape)}, expected {list(reference.shape)}"
        if str(found.dtype) != self.dtype:
            return f"dtype {found.dtype}, expected {self.dtype}"
        return ""

    def _refuse(self, problem: str) -> None:
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(problem)

    def _accumulate(
        self, expected: NDArray[np.float64], actual: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], float]:
        difference = np.abs(actual - expected)
        squares = np.array([(difference**2).sum(), (expected**2).sum(), (actual**2).sum(), (expected * actual).sum()])
        self._sums += squares
        self.abs_max = max(self.abs_max, float(difference.max(initial=0.0)))
        self._count(difference, math.sqrt(squares[1] / max(1, expected.size)))
        return difference, _scaled(squares[0], squares[1])

    def _count(self, difference: NDArray[np.float64], scale: float) -> None:
        wrong = difference[difference > 0]
        self.exact += int(difference.size - wrong.size)
        logs = np.log10(wrong / (scale or 1.0))
        bins = np.clip(np.floor((logs - LOG_LOW) / LOG_STEP), 0, _BINS - 1).astype(np.int64)
        self.histogram += np.bincount(bins, minlength=_BINS)

    def _agree(self, expected: NDArray[np.float64], actual: NDArray[np.float64]) -> None:
        if not self.classify or expected.ndim != 2 or expected.shape[1] < _FEWEST_CLASSES:
            return
        best = expected.argmax(1)
        # NaN sorts last, so it must not look like a winner.
        order = np.argsort(np.where(np.isnan(actual), np.inf, -actual), axis=1, kind="stable")[:, :5]
        self._agreement += ((order[:, 0] == best).sum(), (order == best[:, None]).any(1).sum(), len(best))

    def _rank(self, sample: str, error: float, index: tuple[Any, ...]) -> bool:
        self.errors.append(error)
        if error <= self._worst:
            return False
        self._worst = error
        self.worst_sample, self.worst_index = sample, [int(position) for position in index]
        return True


def _scaled(error: float, reference: float) -> float:
    """Return RMS error / RMS reference from the two sums of squares."""
    if not error:
        return 0.0
    return math.sqrt(error / reference) if reference else math.inf


def _cosine(product: float, reference: float, found: float) -> float:
    if not reference and not found:
        return 1.0
    return min(1.0, float(product / math.sqrt(reference * found))) if reference and found else 0.0


def _best(values: NDArray[np.float64]) -> list[int]:
    """Return the indices of the five largest values of the first row."""
    row = values.reshape(len(values), -1)[0]
    return [int(index) for index in np.argsort(np.where(np.isnan(row), np.inf, -row), kind="stable")[:5]]
