"""Voxelisation of a point cloud (DSVT): the cell of every point, and the occupied cells in sorted order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._prefix import INT32, coords_of, divided, numbers, ranks, rows_of, written
from edgeattn.kernels._statements import Statements
from edgeattn.kernels._voxels import voxels_of
from edgeattn.op import Op

op = Op(
    "voxelize",
    "(points: float32[p f], num_points: int32[1], *, low_x: float, low_y: float, low_z: float, size_x: float,"
    " size_y: float, size_z: float, grid: ints, axes: int, max_voxels: int)"
    " -> (voxel: int32[p], coords: int32[max_voxels+1 4], num_voxels: int32[1])",
)
op.dynamic = ("p",)


@op.reference
def reference(
    points: Tensor,
    num_points: Tensor,
    *,
    low_x: float,
    low_y: float,
    low_z: float,
    size_x: float,
    size_y: float,
    size_z: float,
    grid: list[int],
    axes: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give every point [p, (x, y, z, ...)] the number of its voxel: the rank of its cell among those occupied.

    Cells are floor((point - low) / size), inside grid = [nx, ny, nz]; with `axes` 2 only x and y are tested, and nz
    is 1. voxel int32 [p] is `max_voxels` for points outside, with a coordinate that is not finite, from row num_points
    on, or in a voxel beyond the capacity. coords int32 [max_voxels + 1, (0, z, y, x)] are in the order of (x, y, z),
    then zeros. num_voxels int32 [1] is the true count, may exceed max_voxels. Source: DSVT, dynamic voxelisation.
    """
    count = int(num_points.clamp(0, len(points)))
    found, cells = voxels_of(points[:count], (low_x, low_y, low_z), (size_x, size_y, size_z), grid, axes)
    voxel = torch.full((len(points),), max_voxels, dtype=torch.int32, device=points.device)
    voxel[:count] = found.where((found >= 0) & (found < max_voxels), max_voxels).int()
    coords = F.pad(cells[:max_voxels], (0, 0, 0, max_voxels + 1 - min(len(cells), max_voxels)))
    return voxel, coords.int(), torch.tensor([len(cells)], dtype=torch.int32, device=points.device)


@op.onnx
def body(dims, attributes, dtype):
    s = Statements()
    grid, capacity = attributes["grid"], attributes["max_voxels"]
    cell, kept = _cells(s, dims, attributes)
    rank, count = _ranks(s, cell, kept, grid, dims["p"])
    kept = s.add("And", kept, s.add("Less", rank, s.const(float(capacity), "float")))
    rank = s.add("Where", kept, rank, s.const(float(capacity), "float"))
    voxel = s.add("Cast", rank, out="voxel", to=INT32)
    none = s.const(0, "int32")
    cells = written(s, none, capacity + 1, voxel, s.add("Where", kept, cell, none), dims["p"])
    coords_of(s, cells, grid, "coords")
    s.add("Cast", count, out="num_voxels", to=INT32)
    return str(s)


def _cells(s, dims, attributes):
    """Append the number of every point's cell, that of the whole grid for points outside, and whether it is inside."""
    nx, ny, nz = attributes["grid"]
    flat = attributes["axes"] == 2  # any height, as long as it is a number
    low, size = ([[attributes[f"{kind}_{axis}"]] for axis in "xyz"] for kind in ("low", "size"))
    least, end = [[0.0], [0.0], [-3.4e38 if flat else 0.0]], [[float(nx)], [float(ny)], [3.4e38 if flat else float(nz)]]
    low, size, least, end = (s.const(values, "float") for values in (low, size, least, end))
    place = s.add("Slice", s.add("Transpose", "points", perm=[1, 0]), s.const([0]), s.const([3]), s.const([0]))
    place = s.add("Div", s.add("Sub", place, low), size)  # [3, p]
    fits = s.add("And", s.add("GreaterOrEqual", place, least), s.add("Less", place, end))
    kept = s.add("Less", numbers(s, rows_of(s, "points", dims["p"])), "num_points")
    for part in s.split(fits, 0, 3):
        kept = s.add("And", kept, part)  # [1, p]
    # Where a point is inside, its place is not negative, so that the cast is the floor.
    x, y, z = (s.add("Cast", part, to=INT32) for part in s.split(place, 0, 3))
    cell = s.add("Add", s.add("Mul", x, s.const(ny, "int32")), y)
    if not flat and nz > 1:
        cell = s.add("Add", s.add("Mul", cell, s.const(nz, "int32")), z)
    cell, kept = (s.add("Reshape", each, s.const([-1])) for each in (cell, kept))
    return s.add("Where", kept, cell, s.const(nx * ny * nz, "int32")), kept


def _ranks(s, cell, kept, grid, count):
    """Append what `ranks` does; a tall grid is first reduced to its occupied columns, at most one for a point.

    The grid of 468 x 468 x 32 has 7 million cells: sums over all of them take 20 ms in ONNX Runtime.
    """
    columns, height = grid[0] * grid[1], grid[2]
    if height == 1 or count is None or 2 * count > columns:
        return ranks(s, cell, kept, columns * height, count)
    column, z = divided(s, cell, height)
    rank, _ = ranks(s, column, kept, columns, count)
    cell = s.add("Add", s.add("Mul", s.add("Cast", rank, to=INT32), s.const(height, "int32")), z)
    cell = s.add("Where", kept, cell, s.const(count * height, "int32"))
    return ranks(s, cell, kept, count * height, count)


@op.sample
def sample(dims, attributes, generator):
    """Return points near the middle of cells, some outside the grid or not finite; the last few do not count."""
    low, size = (torch.tensor([attributes[f"{kind}_{axis}"] for axis in "xyz"]) for kind in ("low", "size"))
    grid = torch.tensor(attributes["grid"])
    place = torch.rand(dims["p"], 3, generator=generator) * (grid + 2) - 1
    place = place.floor() + 0.5 + 0.4 * (torch.rand(dims["p"], 3, generator=generator) - 0.5)
    points = torch.randn(dims["p"], dims["f"], generator=generator)
    points[:, :3] = low + place * size
    points[::7, dims["p"] % 3] = float("nan")
    points[1::11, 2] = float("inf")
    return {"points": points, "num_points": torch.tensor([dims["p"] - dims["p"] // 5], dtype=torch.int32)}


_metres = dict(low_x=-3.2, low_y=-1.6, low_z=-2.0, size_x=0.32, size_y=0.32)
op.cases = [
    dict(p=150, f=5, **_metres, size_z=6.0, grid=[20, 10, 1], axes=3, max_voxels=128),
    dict(p=97, f=4, **_metres, size_z=0.1875, grid=[7, 12, 32], axes=3, max_voxels=100),
    dict(p=200, f=5, **_metres, size_z=8.0, grid=[12, 13, 1], axes=2, max_voxels=60),  # too few: the last are dropped
    dict(p=40, f=3, **_metres, size_z=1.0, grid=[15, 16, 9], axes=3, max_voxels=30),
    dict(p=1, f=3, **_metres, size_z=6.0, grid=[5, 4, 1], axes=3, max_voxels=3),
]
