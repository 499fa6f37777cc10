"""Point clouds to validate and to size with: files, seeded sweeps, and the counts that capacities have to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeattn.errors import UsageError
from edgeattn.listing import list_files
from edgeattn.seeding import uniform

Points = NDArray[np.float32]
Counts = Mapping[str, int]

SUFFIXES = (".bin", ".npy", ".npz")
# Points of a seeded sweep: one of a 32-beam sensor, one of a 64-beam sensor, and several joined.
DENSITIES = {"sparse": 20_000, "medium": 60_000, "dense": 180_000}

# Length, width, height and share of what stands around: cars, vans, pedestrians, cyclists, walls.
_KINDS = (
    (4.6, 1.9, 1.7, 0.40),
    (7.5, 2.4, 3.1, 0.10),
    (0.7, 0.7, 1.75, 0.25),
    (1.8, 0.7, 1.7, 0.10),
    (24.0, 0.3, 4.5, 0.15),
)
_OBJECTS = 72
_SENSOR_HEIGHT = 1.9
_CLUTTER = 0.01


@dataclass(frozen=True)
class Stage:
    """Windows of a stage (x, y, z in cells) and their shifts, one per partition, and the `stride` that leads to it."""

    windows: tuple[tuple[int, int, int], ...]
    shifts: tuple[tuple[int, int, int], ...]
    stride: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class VoxelSpec:
    """How a detector cuts space: low corner and cell in metres, cells along x, y, z, set size and stages.

    `axes` is 3, or 2 where points above and below the range count too. `ground` is the height of the ground in metres,
    for seeded sweeps.
    """

    low: tuple[float, float, float]
    size: tuple[float, float, float]
    grid: tuple[int, int, int]
    set_size: int
    stages: tuple[Stage, ...]
    axes: int = 3
    ground: float = 0.0


@dataclass(frozen=True)
class Need:
    """What clouds need of one capacity: percentiles and maximum over the clouds, and the capacity proposed."""

    p50: int
    p95: int
    p99: int
    largest: int
    capacity: int


def load_cloud(path: str | Path, columns: int = 5) -> Points:
    """Return the points [n, columns] of a .bin (rows of little-endian float32), .npy or .npz file; n may be 0.

    An .npz file holds them as `points`, or as its only array. Raises EA0146 for a file that cannot be read as such
    and EA0147 for NaN or infinite values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            "EA0146", f"{path}: {'a folder, not a point cloud' if path.is_dir() else 'no such point cloud'}"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError("EA0146", f"{path}: not a point cloud", hints=[f"known: {' '.join(SUFFIXES)}"])
    try:
        stored = _read(path, columns)
    except UsageError:
        raise
    except Exception as error:  # a damaged archive makes its readers raise nearly anything
        raise UsageError("EA0146", f"{path}: cannot be read", why=str(error).split("\n")[0]) from error
    return check_points(stored, columns, str(path))


def check_points(points: Any, columns: int = 5, name: str = "points") -> Points:
    """Return `points` as contiguous float32 [n, columns]. Raises EA0146 for shape or dtype, EA0147 for NaN or Inf."""
    found = np.asarray(points)
    if found.ndim != 2 or found.shape[1] != columns:
        raise UsageError("EA0146", f"{name}: expects [points x {columns}], got [{' x '.join(map(str, found.shape))}]")
    if found.dtype.kind != "f":
        raise UsageError("EA0146", f"{name}: expects floating-point values, got {found.dtype.name}")
    with np.errstate(over="ignore"):
        cloud = np.ascontiguousarray(found, np.float32)
    bad = ~np.isfinite(cloud).all(1)
    if bad.any():
        count, first = int(bad.sum()), int(bad.argmax())
        message = f"{name}: {count} of {len(cloud)} points have NaN or infinite values, the first is row {first}"
        raise UsageError("EA0147", message, hints=["drop these rows"])
    return cloud


def list_clouds(folder: str | Path) -> list[Path]:
    """Return the point clouds in `folder` and its subfolders, sorted by path, no hidden ones. Raises EA0140."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError("EA0140", f"{root}: no such folder")
    return list_files(root, SUFFIXES, "point clouds")


def seeded_cloud(seed: int | str, count: int, spec: VoxelSpec) -> Points:
    """Return `count` points [count, 5] of a sweep that depends on the arguments alone.

    A sensor in the middle casts rays in rings; each returns from the nearest of about seventy boxes (vehicles, people,
    walls), else from the ground. One in a hundred points is clutter, some of it out of range. The last two columns
    are in [0, 1). Directions come from square roots, not from sines, so that every machine gets the same numbers.
    """
    name = f"cloud/{seed}"
    heading, slope = _rays(name, count)
    near = np.full(count, np.inf)
    for box in _scene(name, spec):
        near = np.minimum(near, _distance(heading, slope, box))
    # A ray over the horizon that meets nothing looks down instead.
    slope = np.where(np.isinf(near) & (slope < 0.025), 0.05 - slope, slope)
    ground = np.where(slope > 0, _SENSOR_HEIGHT / np.maximum(slope, 1e-3), np.inf)
    reach = np.minimum(near, ground) + uniform(f"{name}/range", (count,), -0.03, 0.03)
    xyz = np.column_stack([heading * reach[:, None], spec.ground + _SENSOR_HEIGHT - slope * reach])
    xyz[:, 2] += uniform(f"{name}/height", (count,), -0.02, 0.02)
    clutter = uniform(f"{name}/clutter", (count,)) < _CLUTTER
    extent = np.array(spec.size) * spec.grid
    spread = uniform(f"{name}/spread", (count, 3), -0.02, 1.02) * extent + spec.low
    xyz = np.where(clutter[:, None], spread, xyz)
    features = uniform(f"{name}/features", (count, 2))
    shuffled = np.argsort(uniform(f"{name}/order", (count,)), kind="stable")
    return np.concatenate([xyz, features], 1)[shuffled].astype(np.float32)


def _rays(name: str, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return horizontal unit vectors [n, 2] and downward slopes [n] of rays in rings, denser close by."""
    rings = min(16 + count // 3000, 64)
    ring = (uniform(f"{name}/ring", (count,)) * rings).astype(np.int64)
    outer = (ring + 1.0) / rings
    radius = 3.0 + 72.0 * outer * outer * outer
    slope = _SENSOR_HEIGHT / radius * uniform(f"{name}/jitter", (count,), 0.997, 1.003)
    upward = uniform(f"{name}/upward", (count,)) < 0.12
    slope = np.where(upward, uniform(f"{name}/elevation", (count,), -0.12, 0.02), slope)
    return _unit(f"{name}/azimuth", count), slope


def _unit(name: str, count: int) -> NDArray[np.float64]:
    """Return unit vectors [n, 2]: points on the outline of a square, moved to the circle."""
    turn = 4.0 * uniform(name, (count,))
    side, along = np.floor(turn), 2.0 * (turn % 1.0) - 1.0
    ones = np.ones(count)
    x = np.choose(side.astype(np.int64), [ones, -along, -ones, along])
    y = np.choose(side.astype(np.int64), [along, ones, -along, -ones])
    return np.column_stack([x, y]) / np.sqrt(1.0 + along * along)[:, None]


def _scene(name: str, spec: VoxelSpec) -> NDArray[np.float64]:
    """Return boxes [m, 7] around the sensor: centre x, y, direction of the length (2), length, width, height."""
    kinds = np.array(_KINDS)
    drawn = uniform(f"{name}/kind", (_OBJECTS,))
    kind = np.minimum(np.searchsorted(kinds[:, 3].cumsum(), drawn, side="right"), len(kinds) - 1)
    reach = 0.45 * min(spec.size[0] * spec.grid[0], spec.size[1] * spec.grid[1])
    away = 5.0 + max(reach - 5.0, 1.0) * np.sqrt(uniform(f"{name}/away", (_OBJECTS,)))  # evenly over the area
    # Walls stand back, or the nearest would hide everything behind it.
    away = np.where(kind == len(kinds) - 1, 18.0 + 0.75 * away, away)
    centre = _unit(f"{name}/bearing", _OBJECTS) * away[:, None]
    return np.column_stack([centre, _unit(f"{name}/yaw", _OBJECTS), kinds[kind, :3]])


def _distance(
    heading: NDArray[np.float64], slope: NDArray[np.float64], box: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far along the ground each ray meets `box`, infinite where it does not."""
    (x, y, cos, sin), half = box[:4], box[4:6] / 2
    found = np.full(len(heading), np.inf)
    # Only rays through the circle around the box can.
    aside, ahead = heading[:, 0] * y - heading[:, 1] * x, heading[:, 0] * x + heading[:, 1] * y
    rays = np.flatnonzero((aside * aside <= (half * half).sum()) & (ahead > 0))
    heading, slope = heading[rays], slope[rays]
    start = np.array([-(x * cos + y * sin), x * sin - y * cos])
    way = np.column_stack([heading[:, 0] * cos + heading[:, 1] * sin, heading[:, 1] * cos - heading[:, 0] * sin])
    way = np.where(np.abs(way) < 1e-12, 1e-12, way)
    ends = np.stack([(-half - start) / way, (half - start) / way])
    near, far = ends.min(0).max(1), ends.max(0).min(1)
    top = _SENSOR_HEIGHT - slope * near
    meets = (near <= far) & (near > 0) & (top >= 0) & (top <= box[6])
    found[rays[meets]] = near[meets]
    return found


def count_needs(points: ArrayLike, spec: VoxelSpec) -> dict[str, int]:
    """Return what a cloud [n, 3 or more] needs: `points`, `voxels_S` of stage S and `sets_S_I` of its shift I."""
    cloud = np.asarray(points, np.float32)
    coords, grid = _occupied(cloud, spec), np.array(spec.grid, np.int64)
    needs = {"points": len(cloud)}
    for number, stage in enumerate(spec.stages):
        stride = np.array(stage.stride, np.int64)
        coords, grid = np.unique(coords // stride, axis=0), -(-grid // stride)
        needs[f"voxels_{number}"] = len(coords)
        for index, (window, shift) in enumerate(zip(stage.windows, stage.shifts, strict=True)):
            needs[f"sets_{number}_{index}"] = _sets(coords, grid, window, shift, spec.set_size)
    return needs


def _occupied(cloud: Points, spec: VoxelSpec) -> NDArray[np.int64]:
    """Return the occupied cells [v, 3] (x, y, z), found in float32 as the detector does."""
    low, size = np.array(spec.low, np.float32), np.array(spec.size, np.float32)
    cell = np.floor((cloud[:, :3] - low) / size)
    cell[:, spec.axes :] = 0
    inside = ((cell >= 0) & (cell < np.array(spec.grid))).all(1)
    return np.unique(cell[inside].astype(np.int64), axis=0)


def _sets(
    coords: NDArray[np.int64], grid: NDArray[np.int64], window: Sequence[int], shift: Sequence[int], set_size: int
) -> int:
    """Return the number of sets: each occupied window cuts its voxels into as few as hold them."""
    moved = np.array(shift) * [1, 1, int(grid[2] != window[2])]
    _, voxels = np.unique((coords + moved) // np.array(window), axis=0, return_counts=True)
    return int((-(-voxels // set_size)).sum())


def propose(needs: Sequence[Counts], *, margin: float = 0.2, multiple: int = 64) -> dict[str, Need]:
    """Return a capacity for every count: the largest seen and `margin` on top, rounded up to a `multiple`.

    `needs` has one entry per cloud, as `count_needs` returns them. Percentiles are values that occur.
    """
    if not needs:
        raise ValueError("no clouds to propose capacities from")
    proposals = {}
    for name in needs[0]:
        values = np.array([need[name] for need in needs])
        p50, p95, p99 = (int(v) for v in np.percentile(values, (50, 95, 99), method="higher"))
        largest = int(values.max())
        capacity = max(int(np.ceil(largest * (1 + margin) / multiple)), 1) * multiple
        proposals[name] = Need(p50, p95, p99, largest, capacity)
    return proposals


def overflow(needs: Sequence[Counts], capacities: Counts) -> dict[str, float]:
    """Return the share of clouds over each capacity, and as `any` the share over at least one."""
    over = np.array([[need[name] > limit for name, limit in capacities.items()] for need in needs], bool)
    over = over.reshape(len(needs), len(capacities))
    shares = over.mean(0) if len(needs) else np.zeros(len(capacities))
    every = {name: float(share) for name, share in zip(capacities, shares, strict=True)}
    return {**every, "any": float(over.any(1).mean()) if len(needs) else 0.0}


def _read(path: Path, columns: int) -> NDArray[Any]:
    """Return what the file holds; nothing is ever unpickled."""
    if path.suffix.lower() == ".bin":
        return _read_rows(path, columns)
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return stored
    with stored:
        name = "points" if "points" in stored.files else stored.files[0] if len(stored.files) == 1 else None
        if name is None:
            names = ", ".join(stored.files) or "no array"
            raise UsageError("EA0146", f"{path}: has no array `points`; it holds {names}")
        array: NDArray[Any] = stored[name]
        return array


def _read_rows(path: Path, columns: int) -> NDArray[np.float32]:
    size = path.stat().st_size
    if size % (4 * columns):
        fitting = [width for width in range(3, 9) if size % (4 * width) == 0]
        hint = [f"its size fits rows of {' or '.join(map(str, fitting))} values"] if fitting else []
        raise UsageError("EA0146", f"{path}: {size} bytes are no rows of {columns} float32 values", hints=hint)
    return np.fromfile(path, "<f4").reshape(-1, columns)
