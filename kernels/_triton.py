"""Triton's language where it is installed, and what kernels compute from dims.

There is no Triton for macOS or for every board: an op file must load without it, only its kernel cannot be compiled.
"""

from typing import Any

__all__ = ["block", "jit", "tl"]

try:
    import triton.language as tl
    from triton import jit
except ImportError:
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any) -> Any:
        """Leave a function that kernels call as it is."""
        return function


def block(size: int, least: int = 16) -> int:
    """Return the smallest power of two that holds `size`; 16 is the least a matrix product takes."""
    return max(least, 1 << (size - 1).bit_length())


def area(height: int | None, width: int | None, cell: int = 1) -> int:
    """Return how many places of a map a program of an elementwise kernel takes: a power of two up to 128.

    Large where `height * width / cell` is; any size works, so a dynamic one (None) may get any.
    """
    return 128 if height is None or width is None else min(block(-(-height * width // cell)), 128)
