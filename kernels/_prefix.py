"""Prefix sums, ranges and scatters of integers in ONNX text, shared by the bodies of DSVT's index operators.

Sums are products with triangular matrices in float32: TensorRT has no integer CumSum. They are exact below 2^24, and
stay so when the factors are rounded to TF32, which holds integers up to 2048: larger ones go in as two parts.
"""

import math
from collections.abc import Sequence

from edgeattn.errors import UsageError
from edgeattn.kernels._statements import Statements

INT32, FLOAT = 6, 1
_PART = 2048
LARGEST = 1 << 24  # integers up to here are exact in float32


def levels(size: int) -> list[int]:
    """Return factors whose product is at least `size`: the shape in which `exclusive` sums so many numbers."""
    factors, rest = [32], -(-size // 32)
    while rest > 128:
        factors, rest = [64, *factors], -(-rest // 64)
    return [rest, *factors]


def exclusive(s: Statements, x: str, factors: Sequence[int], bound: int, most: int = LARGEST) -> str:
    """Append the sum of all earlier numbers, for every number of a sequence of prod(factors); return it flat.

    x is float32, any shape that holds one or more such sequences. No number exceeds `bound` and no sum `most`.
    """
    width = factors[-1]
    rows = s.add("Reshape", x, s.const([-1, width]))
    before = row_sums(s, rows, width, bound)
    if len(factors) > 1:
        total = s.add("ReduceSum", rows, s.const([1]), keepdims=1)
        offset = exclusive(s, total, factors[:-1], min(bound * width, most), most)
        before = s.add("Add", before, s.add("Reshape", offset, s.const([-1, 1])))
    return s.add("Reshape", before, s.const([-1]))


def row_sums(s: Statements, rows: str, width: int, bound: int) -> str:
    """Append the exclusive sums along rows [r, width] of numbers up to `bound`."""
    place = list(range(width))
    earlier = s.add("Less", s.const([[each] for each in place], "int32"), s.const([place], "int32"))
    triangle = s.add("Cast", earlier, to=FLOAT)
    if bound <= _PART:
        return s.add("MatMul", rows, triangle)
    high = s.add("Floor", s.add("Mul", rows, s.const(1 / _PART, "float")))
    low = s.add("Sub", rows, s.add("Mul", high, s.const(float(_PART), "float")))
    high = s.add("MatMul", high, triangle)
    return s.add("Add", s.add("Mul", high, s.const(float(_PART), "float")), s.add("MatMul", low, triangle))


def ranks(s: Statements, cell: str, kept: str, cells: int, count: int | None) -> tuple[str, str]:
    """Append the rank of each of `count` items' cells among those occupied, and how many these are [1]: float32.

    Items not kept have the cell number `cells` and get any rank. Raises EA0110 for more cells than float32 counts.
    """
    if cells >= LARGEST:
        raise UsageError("EA0110", f"a grid of {cells} cells; the ONNX body counts up to {LARGEST - 1}")
    factors = levels(cells + 1)
    values = s.add("Cast", kept, to=FLOAT)
    occupied = written(s, s.const(0.0, "float"), product(factors), cell, values, count)
    before = exclusive(s, occupied, factors, 1)
    return looked_up(s, before, cell), s.add("Gather", before, s.const([cells]))


def coords_of(s: Statements, cells: str, grid: Sequence[int], out: str) -> None:
    """Append the rows (0, z, y, x) of cell numbers [v], (x*ny + y)*nz + z, as the output `out`."""
    cells = s.add("Reshape", cells, s.const([1, -1]))
    zero = s.add("Sub", cells, cells)
    cells, z = divided(s, cells, grid[2]) if grid[2] > 1 else (cells, zero)
    x, y = divided(s, cells, grid[1])
    s.add("Transpose", s.add("Concat", zero, z, y, x, axis=0), out=out, perm=[1, 0])


def divided(s: Statements, value: str, size: int) -> tuple[str, str]:
    """Append quotient and remainder of numbers that are not negative."""
    divisor = s.const(size, "int32")
    quotient = s.add("Div", value, divisor)
    return quotient, s.add("Sub", value, s.add("Mul", quotient, divisor))


def rows_of(s: Statements, value: str, size: int | None) -> str:
    """Return the first size of `value`, known or not, as an int32 scalar."""
    if size is not None:
        return s.const(size, "int32")
    shape = s.add("Shape", value, start=0, end=1)
    return s.add("Cast", s.add("Squeeze", shape), to=INT32)


def numbers(s: Statements, count: str) -> str:
    """Append 0, 1, ... count - 1 (int32)."""
    return s.add("Range", s.const(0, "int32"), count, s.const(1, "int32"))


def written(s: Statements, fill: str, size: int, places: str, values: str, count: int | None) -> str:
    """Append a tensor [size] of `fill` with `count` values at places; where places are equal, so are values, or unread.

    TensorRT wants room for as many values as are written, whatever the places are.
    """
    room = max(size, count or 0)
    found = s.add("ScatterElements", s.add("Expand", fill, s.const([room])), places, values, axis=0)
    return leading(s, found, size) if room > size else found


def leading(s: Statements, value: str, count: int) -> str:
    """Append the first so many rows."""
    return s.add("Slice", value, s.const([0]), s.const([count]), s.const([0]))


def looked_up(s: Statements, values: str, places: str) -> str:
    """Append values [m] at places [n]; GatherElements takes a fifth of Gather's time in ONNX Runtime."""
    return s.add("GatherElements", values, places, axis=0)


def product(sizes: Sequence[int]) -> int:
    """Return the product as an int."""
    return math.prod(sizes)
