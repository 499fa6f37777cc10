"""The fixed sizes of a detector's graph: as asked for on the command line, or proposed from sample clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeattn.clouds import Need, count_needs, list_clouds, load_cloud, overflow, propose
from edgeattn.errors import UsageError
from edgeattn.model import Model
from edgeattn.progress import Progress


@dataclass(frozen=True)
class Capacities:
    """Points, voxels (one number, or one per stage) and sets (one number, or one per shift); empty: the model's own."""

    points: int | None = None
    voxels: tuple[int, ...] = ()
    sets: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.points is not None or bool(self.voxels) or bool(self.sets)

    def over(self, other: Capacities) -> Capacities:
        """Return these sizes, with those of `other` where nothing is given."""
        points = other.points if self.points is None else self.points
        return Capacities(points, self.voxels or other.voxels, self.sets or other.sets)


_NONE = Capacities()


def profile(model: Model, folder: str | Path, progress: Progress, given: Capacities = _NONE) -> Capacities:
    """Return capacities that hold every cloud in `folder` with room to spare, where nothing is `given`.

    Tells the figures behind them, and the share of clouds over each. Raises EA0115 for a model that takes no clouds,
    EA0140 for a folder without any, EA0146 for an unreadable one.
    """
    cloud = model.inputs[0].cloud
    if cloud is None:
        raise UsageError("EA0115", f"--profile-from: {model.name} takes no point clouds")
    files = list_clouds(folder)
    needs = []
    with progress.stage("profile", f"{len(files)} clouds") as stage:
        for number, file in enumerate(files, 1):
            needs.append(count_needs(load_cloud(file, len(cloud.columns)), cloud.space))
            stage.fraction = number / len(files)
        needed = propose(needs)
        stage.result = f"{needed['points'].largest} points at most"
    proposed = given.over(_together(needed))
    limits = {name: _limit(proposed, name) for name in needed}
    for line in _table(needed, limits, overflow(needs, limits)):
        progress.note(line)
    return proposed


def _together(needed: Mapping[str, Need]) -> Capacities:
    """Return one number for the points, one per stage for the voxels, one per shift for the sets of every stage."""
    voxels = [need.capacity for name, need in needed.items() if name.startswith("voxels_")]
    sets = [
        max(need.capacity for name, need in needed.items() if name.startswith("sets_") and name.endswith(f"_{shift}"))
        for shift in range(2)
    ]
    return Capacities(needed["points"].capacity, tuple(voxels), tuple(sets))


def _limit(capacities: Capacities, name: str) -> int:
    kind, _, index = name.partition("_")
    if kind == "points":
        assert capacities.points is not None
        return capacities.points
    sizes, place = (capacities.voxels, index) if kind == "voxels" else (capacities.sets, index.rpartition("_")[2])
    return sizes[min(int(place), len(sizes) - 1)]


def _table(needed: Mapping[str, Need], limits: Mapping[str, int], shares: Mapping[str, float]) -> Sequence[str]:
    rows = [f"{'':12} {'p50':>8} {'p95':>8} {'p99':>8} {'largest':>8} {'capacity':>9}  clouds over"]
    for name, need in needed.items():
        figures = f"{need.p50:8} {need.p95:8} {need.p99:8} {need.largest:8} {limits[name]:9}"
        rows.append(f"{name:12} {figures}  {shares[name]:.1%}")
    return rows
