"""Triton's language where it is installed, and what kernels compute from dims.

There is no Triton for macOS or for every board: an op file must load without it, only its kernel cannot be compiled.
"""

from typing import Any

__all__ = ["block", "tl"]

try:
    import triton.language as tl
except ImportError:
    tl: Any = None  # type: ignore[no-redef]


def block(size: int, least: int = 16) -> int:
    """Return the smallest power of two that holds `size`; 16 is the least a matrix product takes."""
    return max(least, 1 << (size - 1).bit_length())
