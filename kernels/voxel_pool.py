"""Pooling of voxels into larger cells (DSVT, voxel form): which voxels each pooled one is made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.errors import UsageError
from edgeattn.kernels._prefix import (
    FLOAT,
    INT32,
    coords_of,
    exclusive,
    levels,
    numbers,
    product,
    ranks,
    rows_of,
    written,
)  # fmt: skip
from edgeattn.kernels._statements import Statements
from edgeattn.kernels._voxels import pool, sample_voxels
from edgeattn.op import Op

op = Op(
    "voxel_pool",
    "(coords: int32[n 4], num_voxels: int32[1], *, grid: ints, stride: ints, slots: int, max_voxels: int)"
    " -> (table: int32[max_voxels+1 slots], pooled: int32[max_voxels+1 4], num_pooled: int32[1])",
)


@op.reference
def reference(
    coords: Tensor, num_voxels: Tensor, *, grid: list[int], stride: list[int], slots: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge voxels [n, (0, z, y, x)], in the order of (x, y, z), into cells of `stride` (x, y, z) of them.

    The first num_voxels rows count, at most n - 1. Slot (iz*sy + iy)*sx + ix of table int32 [max_voxels + 1, slots]
    holds the voxel at that place of the pooled cell, n - 1 where there is none. pooled int32 [max_voxels + 1,
    (0, z, y, x)] is in the order of (x, y, z), then zeros. num_pooled int32 [1] is the true count and may exceed
    max_voxels. slots is the product of stride, else EA0110. Source: DSVT, section 3.4.
    """
    _check(stride, slots)
    spare = len(coords) - 1
    found, cells = pool(coords[: int(num_voxels.clamp(0, spare))], grid, stride)
    kept = min(len(found), max_voxels)
    padding = (0, 0, 0, max_voxels + 1 - kept)
    table = F.pad(found[:kept].where(found[:kept] >= 0, spare), padding, value=spare)
    count = torch.tensor([len(cells)], dtype=torch.int32, device=coords.device)
    return table.int(), F.pad(cells[:kept], padding).int(), count


@op.onnx
def body(dims, attributes, dtype):
    grid, stride, slots, capacity = (attributes[name] for name in ("grid", "stride", "slots", "max_voxels"))
    _check(stride, slots)
    s = Statements()
    spare = s.add("Sub", rows_of(s, "coords", dims["n"]), s.const(1, "int32"))
    index = numbers(s, rows_of(s, "coords", dims["n"]))
    valid = s.add("Less", index, s.add("Min", "num_voxels", spare))
    reduced = [-(-cells // step) for cells, step in zip(grid, stride, strict=True)]
    cell, slot = _cells(s, valid, reduced, stride)
    if dims["n"] and list(stride[:2]) == [1, 1]:
        rank, count = _run_ranks(s, cell, valid, dims["n"])
    else:
        rank, count = ranks(s, cell, valid, product(reduced), dims["n"])
    kept = s.add("And", valid, s.add("Less", rank, s.const(float(capacity), "float")))
    home = s.add("Cast", s.add("Where", kept, rank, s.const(float(capacity), "float")), to=INT32)
    place = s.add("Add", s.add("Mul", home, s.const(slots, "int32")), s.add("Where", kept, slot, s.const(0, "int32")))
    table = written(s, spare, (capacity + 1) * slots, place, s.add("Where", kept, index, spare), dims["n"])
    s.add("Reshape", table, s.const([capacity + 1, slots]), out="table")
    none = s.const(0, "int32")
    listed = written(s, none, capacity + 1, home, s.add("Where", kept, cell, none), dims["n"])
    coords_of(s, listed, reduced, "pooled")
    s.add("Cast", count, out="num_pooled", to=INT32)
    return str(s)


def _check(stride, slots):
    if product(stride) != slots:
        raise UsageError("EA0110", f"voxel_pool: slots is {slots}; a stride of {stride} makes {product(stride)}")


def _cells(s, valid, reduced, stride):
    """Append every voxel's pooled cell, the number of cells where there is no voxel, and its slot in it."""
    nx, ny, nz = reduced
    sx, sy, sz = stride
    places = s.add("Transpose", "coords", perm=[1, 0])  # [4, n]: 0, z, y, x
    steps = s.const([[1], [sz], [sy], [sx]], "int32")
    cells = s.add("Div", places, steps)
    inside = s.add("Sub", places, s.add("Mul", cells, steps))
    cell = _weighted(s, cells, [0, 1, nz, ny * nz])
    cell = s.add("Where", valid, cell, s.const(nx * ny * nz, "int32"))
    return cell, _weighted(s, inside, [0, sy * sx, sx, 1])


def _weighted(s, values, weights):
    terms = s.add("Mul", values, s.const([[weight] for weight in weights], "int32"))
    return s.add("ReduceSum", terms, s.const([0]), keepdims=0)


def _run_ranks(s, cell, valid, n):
    """Append what `ranks` does, from voxels whose pooled cells come in order: no grid is needed."""
    previous = s.add("Slice", cell, s.const([0]), s.const([n - 1]), s.const([0]))
    previous = s.add("Concat", s.const([-1], "int32"), previous, axis=0)
    first = s.add("And", valid, s.add("Not", s.add("Equal", cell, previous)))
    first = s.add("Cast", first, to=FLOAT)
    factors = levels(n + 1)
    padded = s.add("Pad", first, s.const([0, product(factors) - n]))
    before = exclusive(s, padded, factors, 1)
    rank = s.add("Slice", before, s.const([0]), s.const([n]), s.const([0]))
    rank = s.add("Sub", s.add("Add", rank, first), s.const(1.0, "float"))
    return rank, s.add("Gather", before, s.const([n]))


@op.sample
def sample(dims, attributes, generator):
    return sample_voxels(dims["n"], attributes["grid"], generator)


op.cases = [
    dict(n=131, grid=[9, 8, 32], stride=[1, 1, 4], slots=4, max_voxels=128),
    dict(n=60, grid=[10, 12, 2], stride=[1, 1, 2], slots=2, max_voxels=20),  # too few: the last are dropped
    dict(n=90, grid=[7, 9, 8], stride=[2, 3, 4], slots=24, max_voxels=89),
    dict(n=2, grid=[4, 4, 4], stride=[1, 1, 4], slots=4, max_voxels=1),
]
