"""Voxels, sets and pooled voxels with data-dependent sizes: the definition of DSVT's index operators.

The PyTorch original runs these functions on a batch of clouds. The operators with fixed capacities (`voxelize`,
`set_partition`, `voxel_pool`) are defined by them, padded. Source: DSVT (CVPR 2023), sections 3.2 and 3.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def voxels_of(
    points: Tensor,
    low: Sequence[float],
    size: Sequence[float],
    grid: Sequence[int],
    axes: int = 3,
    batch_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the voxel of every point and the voxels: int64 [p], -1 outside, and int64 [v, 4] (batch, z, y, x).

    points [p, 3 or more] start with x, y, z; cells are floor((point - low) / size) in their dtype, with both limits
    rounded to float32 as the authors hold them. With `axes` 2 the height is not tested and its cell is 0. A point
    with a coordinate that is not finite is outside. Voxels are ordered by (batch, x, y, z).
    """
    place = points[:, :3]
    corner, width = (torch.tensor(values, dtype=torch.float32).to(place) for values in (low, size))
    cell = torch.floor((place - corner) / width)
    inside = (cell >= 0) & (cell < torch.tensor(list(grid)).to(place))
    if axes == 2:
        inside[:, 2] = place[:, 2].isfinite()
        cell[:, 2] = 0
    kept = inside.all(1)
    x, y, z = cell[kept].long().unbind(1)
    batch = torch.zeros_like(x) if batch_index is None else batch_index[kept].long()
    nx, ny, nz = grid
    keys, owner = torch.unique(((batch * nx + x) * ny + y) * nz + z, return_inverse=True)
    voxel = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    voxel[kept] = owner
    return voxel, _coords(keys, grid)


def partition(
    coords: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int], set_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group voxels [v, 4] (batch, z, y, x) into sets of equal size inside the windows of one configuration.

    Returns int64 tensors: inds [2, sets, set_size] (y-major order, x-major order), slot [2, v]: flat
    place of the first entry of every voxel in inds[0] and inds[1], position [v] = (iz*wy + iy)*wx + ix inside the
    window, and the window number [v]. grid, window and shift are in the order x, y, z.
    """
    number, (ix, iy, iz) = windows_of(coords, grid, window, shift)
    wx, wy, wz = window
    _, owner, count = torch.unique(number, return_inverse=True, return_counts=True)
    sets = (count + set_size - 1) // set_size
    home = torch.repeat_interleave(sets)  # window of every set
    place = (torch.arange(len(home), device=coords.device) - (sets.cumsum(0) - sets)[home]).unsqueeze(1) * set_size
    place = place + torch.arange(set_size, device=coords.device)
    count, sets, start = (each[home].unsqueeze(1) for each in (count, sets, count.cumsum(0) - count))
    entry = start + place * count // (sets * set_size)
    keys = ((iy * wx + ix) * wz + iz, (ix * wy + iy) * wz + iz)
    inds = torch.stack([torch.argsort(owner * (wx * wy * wz) + key)[entry] for key in keys])
    return inds, first_places(inds, len(coords)), (iz * wy + iy) * wx + ix, number


def windows_of(
    coords: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return the window number [v] of every voxel [v, 4] and its cell inside the window, [v] each for x, y and z."""
    number, z, y, x = coords.long().unbind(1)
    inside = []
    for value, cells, width, offset in zip((x, y, z), grid, window, moved(grid, window, shift), strict=True):
        number = number * (-(-cells // width) + 1) + (value + offset) // width
        inside.append((value + offset) % width)
    return number, inside


def moved(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """Return the shift in use: none along z where one window spans the height."""
    return [shift[0], shift[1], 0 if grid[2] == window[2] else shift[2]]


def first_places(inds: Tensor, voxels: int) -> Tensor:
    """Return the flat place of every voxel's first entry in inds [2, sets, set_size]: int64 [2, voxels]."""
    first = torch.ones_like(inds, dtype=torch.bool)
    first[..., 1:] = inds[..., 1:] != inds[..., :-1]
    slot = torch.zeros(2, voxels, dtype=torch.int64, device=inds.device)
    for axis in range(2):
        flat = first[axis].flatten()
        slot[axis, inds[axis].flatten()[flat]] = flat.nonzero().squeeze(1)
    return slot


def pool(coords: Tensor, grid: Sequence[int], stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Merge voxels [v, 4] (batch, z, y, x) of a grid into cells of `stride` (x, y, z).

    Returns int64 tensors: table [m, slots] of voxel ids, -1 in an empty slot, and the pooled coords [m, 4], ordered by
    (batch, x, y, z). The slot is (iz*sy + iy)*sx + ix inside the pooled cell.
    """
    batch, z, y, x = coords.long().unbind(1)
    sx, sy, sz = stride
    reduced = [-(-cells // step) for cells, step in zip(grid, stride, strict=True)]
    key = ((batch * reduced[0] + x // sx) * reduced[1] + y // sy) * reduced[2] + z // sz
    keys, owner = torch.unique(key, return_inverse=True)
    table = torch.full((len(keys), sx * sy * sz), -1, dtype=torch.int64, device=coords.device)
    table[owner, (z % sz * sy + y % sy) * sx + x % sx] = torch.arange(len(coords), device=coords.device)
    return table, _coords(keys, reduced)


def _coords(keys: Tensor, grid: Sequence[int]) -> Tensor:
    """Return rows (batch, z, y, x) of keys ((batch*nx + x)*ny + y)*nz + z."""
    nx, ny, nz = grid
    columns = (keys // (nx * ny * nz), keys % nz, keys // nz % ny, keys // (nz * ny) % nx)
    return torch.stack(columns, 1)


def sample_voxels(rows: int, grid: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return example inputs of an op on voxels: coords int32 [rows, (0, z, y, x)] in order, and num_voxels int32 [1].

    Voxels come in clumps, so that windows and columns are filled unevenly; a few rows at the end hold none.
    """
    nx, ny, nz = grid
    voxels = min(rows - 1 - rows // 9, nx * ny * nz)
    crowded = torch.rand(nx, 1, 1, generator=generator) * torch.rand(1, ny, 1, generator=generator)
    score = crowded + 0.3 * torch.rand(nx, ny, nz, generator=generator)
    cells = score.flatten().topk(voxels).indices.sort().values
    coords = torch.zeros(rows, 4, dtype=torch.int32)
    coords[:voxels] = _coords(cells, grid).int()
    return {"coords": coords, "num_voxels": torch.tensor([voxels], dtype=torch.int32)}
