"""The orthonormal Haar filters shared by analysis and synthesis: bands sum, vertical, horizontal, diagonal."""

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


def filters_text(channels: int, dtype: str) -> str:
    """Return the body statement that defines `filters` with these values."""
    return constant("filters", [[band] for band in _BANDS] * channels, dtype)
