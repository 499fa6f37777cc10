"""Deterministic weights and images: pure functions of a name, a shape and a seed, the same on every machine.

Random bits are those of PCG64 seeded with the first eight bytes of sha256(name), the top 53 of each word taken as a
number in [0, 1); only sums, products, quotients and one square root follow, in float64, rounded once at the end.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_Draw = Callable[[str, tuple[int, ...]], Array]


def uniform(name: str, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Array:
    """Return numbers in [low, high) that depend on nothing but `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    numbers: Array = (low + (high - low) * unit).reshape(shape)
    return numbers


def noise(name: str, shape: Sequence[int]) -> Array:
    """Return uniform numbers of mean 0 and variance 1."""
    numbers: Array = math.sqrt(3.0) * (2.0 * uniform(name, shape) - 1.0)
    return numbers


def seeded_value(key: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
    """Return the float32 weight of state-dict entry `key`, or None where the entry stays as constructed."""
    shape = tuple(shape)
    if _KEPT.fullmatch(key):
        return None
    rules = (*_NAMED, *(_VECTORS if len(shape) <= 1 else _MATRICES))
    draw = next(draw for pattern, draw in rules if pattern.fullmatch(key))
    return draw(key, shape).astype(np.float32)


def _within(low: float, high: float) -> _Draw:
    return lambda key, shape: uniform(key, shape, low, high)


def _spread(factor: float) -> _Draw:
    return lambda key, shape: factor * noise(key, shape)


def _per_row(factor: float) -> _Draw:
    """Keep the variance of a product with the last axis."""
    return lambda key, shape: factor * noise(key, shape) / np.sqrt(shape[-1])


def _per_filter(gain: float) -> _Draw:
    """Keep the variance of a convolution or product times `gain` squared."""
    return lambda key, shape: gain * noise(key, shape) / np.sqrt(float(math.prod(shape[1:])))


def _centred(gain: float) -> _Draw:
    """Take the mean out of each filter of a detection head, so that no class wins by a constant."""

    def draw(key: str, shape: tuple[int, ...]) -> Array:
        value = _per_filter(gain)(key, shape)
        centred: Array = value - value.mean(axis=tuple(range(1, value.ndim)), keepdims=True)
        return centred

    return draw


def _point_encoder(key: str, shape: tuple[int, ...]) -> Array:
    """Scale the columns (x, y, z, intensity, extra, 3 + 3 offsets): metres would swamp the offsets."""
    value = _per_filter(1.0)(key, shape)
    columns = np.array([0.025, 0.025, 0.5, 1.0, 1.0, 4.0, 4.0, 2.0, 4.0, 4.0, 0.5])
    return value * columns if shape[1] == len(columns) else value


def _heatmap_bias(key: str, shape: tuple[int, ...]) -> Array:
    """Balance the three Waymo classes; any other number of classes gets the common range."""
    return np.array([-1.45, -1.2, -2.95]) if shape == (3,) else uniform(key, shape, -2.4, -2.0)


def _rules(*rows: tuple[str, _Draw]) -> list[tuple[re.Pattern[str], _Draw]]:
    return [(re.compile(rf"(?:.*\.)?(?:{ends})"), draw) for ends, draw in rows]


# What the last components of a key are -> how its value is drawn; the first match counts.
_KEPT = re.compile(r"(?:.*\.)?i?wt_filter")
_NAMED = _rules(
    (r"running_mean", _within(-0.2, 0.2)),
    (r"running_var", _within(0.5, 1.5)),
    (r"stage\d+\.0\.ls\.gamma", _within(1.5, 2.5)),  # blocks without a skip around them
    (r"gamma", _within(0.2, 0.4)),
    (r"(?:base_scale|wavelet_scale\.\d+)\.weight", _within(0.5, 1.5)),
    (r"A_logs", _within(-1.0, 1.0)),
    (r"Ds", _within(0.5, 1.5)),
    (r"dt_projs_bias", _within(-3.0, 0.0)),
    (r"dt_projs_weight", _per_row(1.0)),
    (r"x_proj_weight", _per_row(2.0)),
    (r"pos_embedding", _spread(0.5)),
)
_VECTORS = _rules(
    (r"(?:pw2\.bn|proj\.1\.bn|(?:dw0|dw1|conv)\.m\.bn)\.weight", _within(0.1, 0.5)),  # closing norm of a branch
    (r".*weight", _within(0.5, 1.5)),
    (r"hm\.1\.bias", _heatmap_bias),
    (r"(?:hm|heatmap)\.\d+\.bias", _within(-2.4, -2.0)),
    (r"dim\.\d+\.bias", _within(0.8, 1.2)),
    (r".*", _within(-0.15, 0.15)),
)
_MATRICES = _rules(
    (r".*position_embedding_head\.0\.weight", _per_filter(0.3)),
    (r".*position_embedding_head\.3\.weight", _per_filter(1.3)),
    (r"in_proj_weight", _per_filter(1.35)),
    (r"(?:qkv\.c|qk\.conv)\.weight", _per_filter(1.3)),
    (r"(?:hm|heatmap)\.1\.weight", _centred(3.0)),
    (r"(?:hm|heatmap)\.\d+\.weight", _per_filter(3.0)),
    (r"iou\.\d+\.weight", _per_filter(0.5)),
    (r"(?:heatmap_head|dim)\.1\.weight", _centred(1.0)),
    (r".*pfn_layers\.0\.linear\.weight", _point_encoder),
    (r".*", _per_filter(1.0)),
)
