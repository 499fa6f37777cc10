"""The orthonormal Haar filters shared by analysis and synthesis: bands sum, vertical, horizontal, diagonal."""

import math

import numpy as np
import torch
from torch import Tensor

from edgeattn.op import constant

_BANDS = (
    ((0.5, 0.5), (0.5, 0.5)),
    ((0.5, 0.5), (-0.5, -0.5)),
    ((0.5, -0.5), (0.5, -0.5)),
    ((0.5, -0.5), (-0.5, 0.5)),
)


def filters(channels: int, like: Tensor) -> Tensor:
    """Return the four filters of every channel, [4 * channels, 1, 2, 2], in dtype and on device of `like`."""
    return torch.tensor(_BANDS, dtype=like.dtype, device=like.device).unsqueeze(1).repeat(channels, 1, 1, 1)


def group_of(channels: int, places: int | None, limit: int) -> int:
    """Return how many channels a group of the ONNX convolution holds: 16, filled up with zeros, on maps up to `limit`.

    ONNX Runtime has blocked kernels for groups of 16 channels only; from `limit` on the extra products outweigh that.
    """
    return math.gcd(channels, 16) if places is not None and places <= limit else 1


def filters_text(channels: int, group: int, dtype: str) -> str:
    """Return the body statements that define `filters`, [4 * channels, group, 2, 2]."""
    block = np.einsum("ij,bhw->ibjhw", np.eye(group), np.array(_BANDS)).reshape(4 * group, group, 2, 2) + 0.0
    values = np.tile(block, (channels // group, 1, 1, 1))
    if dtype == "float":
        return constant("filters", values, "float")
    return constant("exact", values, "float") + "\nfilters = CastLike(exact, x)"
