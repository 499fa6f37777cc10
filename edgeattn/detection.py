"""A detector's two ends on the host: a point cloud becomes its fixed inputs, its candidates become detections.

Only numpy: this runs on boards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.boxes import Detections, suppress_center, suppress_crowded
from edgeattn.clouds import DENSITIES, Points, Stage, VoxelSpec, check_points, count_needs, seeded_cloud
from edgeattn.errors import UsageError
from edgeattn.tensors import TensorSpec

Array = NDArray[Any]
SUPPRESSION: dict[str, Callable[[Detections], Detections]] = {"center": suppress_center, "crowded": suppress_crowded}
# Candidates are the same when no coordinate differs by more, in metres and radians: cells are 0.3 m apart.
_SAME = 0.1


@dataclass(frozen=True)
class Detector:
    """What makes detections of the candidates: class names, and the non-maximum suppression that runs on the host.

    `nms` is a key of `SUPPRESSION`; `stages` are submodules whose outputs validation compares one by one.
    """

    classes: tuple[str, ...]
    nms: str
    stages: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Detector:
        """Read a manifest entry."""
        return cls(tuple(entry["classes"]), str(entry["nms"]), tuple(entry["stages"]))


def losses(points: int, counts: Sequence[int], spec: TensorSpec) -> list[str]:
    """Say what did not fit: `points` of the cloud, and the `counts` of the graph (voxels, then sets, by stage)."""
    assert spec.cloud is not None
    voxels, sets = spec.cloud["voxels"], spec.cloud["sets"]
    names = [f"voxels of stage {number}" for number in range(len(voxels))]
    names += [f"sets of stage {number}, shift {shift}" for number in range(len(sets)) for shift in range(2)]
    limits = [*voxels, *(most for pair in sets for most in pair)]
    needs = [("points", points, spec.shape()[0]), *zip(names, map(int, counts), limits, strict=True)]
    return [loss(name, found, most) for name, found, most in needs if found > most]


def loss(name: str, found: int, most: int) -> str:
    """Say how much of what was found did not fit."""
    return f"{name}: {found} found, {most} fit, {found - most} lost"


def cloud_input(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """Return the input that takes a point cloud, if there is one."""
    return next((spec for spec in inputs if spec.cloud is not None), None)


def pack(points: Any, spec: TensorSpec) -> tuple[dict[str, Array], int]:
    """Return the inputs for a cloud [n, columns], and n: points beyond the capacity are left out.

    Raises EA0146 for a wrong shape or dtype, EA0147 for NaN and infinite values.
    """
    assert spec.cloud is not None
    capacity, columns = spec.shape()
    cloud = check_points(points, columns, spec.name)
    rows = np.zeros((capacity, columns), np.float32)
    kept = min(len(cloud), capacity)
    rows[:kept] = cloud[:kept]
    return {spec.name: rows, spec.cloud["count"]: np.array([kept], np.int32)}, len(cloud)


def seeded_feeds(seed: int | str, spec: TensorSpec) -> dict[str, Array]:
    """Return a seeded sweep that fits the capacities; seeds take turns through the densities."""
    turn = int(str(seed).rpartition("/")[2])  # "0/3" is sample 3 of seed 0
    count = min(list(DENSITIES.values())[turn % len(DENSITIES)], spec.shape()[0])
    while not _fits(points := sweep(seed, count, spec), spec):
        count = count * 3 // 4
    return pack(points, spec)[0]


def sweep(seed: int | str, count: int, spec: TensorSpec) -> Points:
    """Return a seeded cloud of `count` points in the range of this input."""
    assert spec.cloud is not None
    return seeded_cloud(seed, count, space(spec.cloud))


def space(cloud: Mapping[str, Any]) -> VoxelSpec:
    """Return how the manifest entry `cloud` cuts space."""
    entry = cloud["space"]
    stages = [
        Stage(_triples(stage["windows"]), _triples(stage["shifts"]), _triples([stage["stride"]])[0])
        for stage in entry["stages"]
    ]
    grid = _triples([entry["grid"]])[0]
    low, size = ((float(x), float(y), float(z)) for x, y, z in (entry["low"], entry["size"]))
    return VoxelSpec(low, size, grid, int(entry["set_size"]), tuple(stages), int(entry["axes"]), float(entry["ground"]))


def _triples(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(x), int(y), int(z)) for x, y, z in rows)


def _fits(points: Points, spec: TensorSpec) -> bool:
    assert spec.cloud is not None
    needs = count_needs(points, space(spec.cloud))
    counts = [number for kind in ("voxels", "sets") for name, number in needs.items() if name.startswith(kind)]
    return not losses(len(points), counts, spec)


def detect(outputs: Mapping[str, Array], detector: Detector, spec: TensorSpec, points: int) -> Detections:
    """Return the detections of one run: candidates suppressed, and a warning for every capacity that did not hold.

    A cloud without a point in the range has none.
    """
    found = Detections(outputs["boxes"], outputs["scores"], outputs["labels"], detector.classes)
    if not outputs["counts"][0]:
        found = found.take(slice(0))  # no point in the range: what the head makes of an empty map means nothing
    lost = losses(points, outputs["counts"].tolist(), spec)
    return replace(SUPPRESSION[detector.nms](found), warnings=tuple(lost))


def refuse_losses(found: Detections, name: str = "the cloud") -> Detections:
    """Return `found`, or raise EA0148 when a capacity did not hold for the cloud called `name`."""
    if found.warnings:
        raise UsageError(
            "EA0148",
            f"{name} does not fit: {'; '.join(found.warnings)}",
            hints=["export with larger --max-points, --max-voxels or --max-sets"],
        )
    return found


def align(
    found: Mapping[str, Array], expected: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array], float]:
    """Return both results with candidates in one order, and the share that both have.

    Rounding swaps neighbours in the ranking, and turns a heading of pi into one of -pi; neither is an error. What only
    one side has is left out and lowers the share. Outputs other than boxes, scores and labels stay as they are.
    """
    ours, theirs = _candidates(found), _candidates(expected)
    turned = ours[:, None, 6] - theirs[:, 6]
    apart = np.abs(ours[:, None, :6] - theirs[:, :6]).max(2)
    apart = np.maximum(apart, np.abs((turned + np.pi) % (2 * np.pi) - np.pi))
    different = found["labels"][found["labels"] > 0][:, None] != expected["labels"][expected["labels"] > 0]
    rows, columns = _pairs(np.where(different, np.inf, apart))
    share = len(rows) / max(len(ours), len(theirs)) if len(ours) or len(theirs) else 1.0
    first, second = _select(found, rows), _select(expected, columns)
    if len(rows):
        first["boxes"][:, 6] -= (np.round(turned[rows, columns] / (2 * np.pi)) * 2 * np.pi).astype(np.float32)
    return first, second, share


def _candidates(outputs: Mapping[str, Array]) -> NDArray[np.float64]:
    boxes: NDArray[np.float64] = outputs["boxes"][outputs["labels"] > 0].astype(np.float64)
    return boxes


def _pairs(apart: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one-to-one pairs of rows and columns, the closest first, in the order of the columns."""
    row, column = np.nonzero(apart <= _SAME)
    taken: dict[int, int] = {}
    used: set[int] = set()
    for pair in np.argsort(apart[row, column], kind="stable"):
        if row[pair] not in used and column[pair] not in taken:
            used.add(int(row[pair]))
            taken[int(column[pair])] = int(row[pair])
    columns = sorted(taken)
    return np.array([taken[each] for each in columns], np.int64), np.array(columns, np.int64)


def _select(outputs: Mapping[str, Array], rows: NDArray[np.int64]) -> dict[str, Array]:
    """Return the outputs with those `rows` of the candidates that are boxes."""
    boxes = np.flatnonzero(outputs["labels"] > 0)[rows]
    ranked = ("boxes", "scores", "labels")
    return {name: value[boxes] if name in ranked else value for name, value in outputs.items()}
