"""Detections on the host: overlap of rotated boxes, suppression as the two heads of DSVT want it, and matching.

Only numpy. A rectangle is (x, y, dx, dy, angle): dx along its own x axis, turned counter-clockwise by `angle`. A box is
(x, y, z, dx, dy, dz, heading), followed by (vx, vy) on nuScenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

FIELDS = ("x", "y", "z", "dx", "dy", "dz", "heading", "vx", "vy")
CENTER_THRESHOLDS = (0.7, 0.6, 0.55)
# Pedestrians and traffic cones of nuScenes, counted from 0; nothing else is suppressed there.
CROWDED_THRESHOLDS = {8: 0.175, 9: 0.175}

# A corner this near to an edge, in metres, lies on it: rounding must not make a shared edge cross itself.
_ON_EDGE = 1e-9
# Pairs clipped at once; a pair takes about one kilobyte.
_PAIRS_AT_ONCE = 65536


@dataclass(frozen=True)
class Detections:
    """Boxes float32 [n, 7 or 9], scores float32 [n], labels int32 [n] from 1, class names, and what to know of them.

    The columns are also fields: `x`, `y`, `z`, `dx`, `dy`, `dz`, `heading`, `vx`, `vy`, and `score`, `label`, `name`.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    names: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getattr__(self, field: str) -> NDArray[Any]:
        if field in FIELDS and FIELDS.index(field) < self.boxes.shape[1]:
            return self.boxes[:, FIELDS.index(field)]
        raise AttributeError(f"detections have no field {field!r}")

    @property
    def score(self) -> NDArray[np.float32]:
        """Return the scores."""
        return self.scores

    @property
    def label(self) -> NDArray[np.int32]:
        """Return the labels, from 1."""
        return self.labels

    @property
    def name(self) -> list[str]:
        """Return the class name of every box, its label where no names are known."""
        return [self.names[label - 1] if 0 < label <= len(self.names) else str(label) for label in self.labels]

    def take(self, index: slice | Indices | NDArray[np.bool_]) -> Detections:
        """Return the boxes that `index` selects."""
        return Detections(self.boxes[index], self.scores[index], self.labels[index], self.names, self.warnings)


@dataclass(frozen=True)
class Match:
    """How two sets of detections compare: their sizes, the pairs of equal label that overlap, and their scores."""

    found: int
    expected: int
    matched: int
    score_difference: float

    @property
    def share(self) -> float:
        """Return matched pairs over the larger set: missing and extra boxes both count; 1 for two empty sets."""
        return self.matched / max(self.found, self.expected) if self.found or self.expected else 1.0


def bev_iou(first: ArrayLike, second: ArrayLike) -> Array:
    """Return the IoU [n, m] of rectangles [n, 5] with rectangles [m, 5]."""
    a, b = _rows(first, 5), _rows(second, 5)
    shared = _shared_area(a, b)
    return _ratio(shared, _product(a, 2, 4)[:, None] + _product(b, 2, 4) - shared)


def box_iou(first: ArrayLike, second: ArrayLike) -> Array:
    """Return the 3-D IoU [n, m] of boxes [n, 7 or more] with boxes [m, 7 or more]."""
    a, b = _rows(first, 7), _rows(second, 7)
    high = np.minimum(a[:, None, 2] + a[:, None, 5] / 2, b[:, 2] + b[:, 5] / 2)
    low = np.maximum(a[:, None, 2] - a[:, None, 5] / 2, b[:, 2] - b[:, 5] / 2)
    shared = _shared_area(rectangles(a), rectangles(b)) * (high - low).clip(0)
    return _ratio(shared, _product(a, 3, 6)[:, None] + _product(b, 3, 6) - shared)


def rectangles(boxes: ArrayLike, *, center_head: bool = False) -> Array:
    """Return the rectangles [n, 5] of boxes [n, 7 or more].

    With `center_head`, those that the authors' centre head suppresses by: turned back by 90 degrees without swapping
    the sides, a slip in a change of conventions that has to be repeated to get the authors' detections.
    """
    rows = _rows(boxes, 7)
    angle = rows[:, 6] - np.pi / 2 if center_head else rows[:, 6]
    return np.column_stack([rows[:, [0, 1, 3, 4]], angle])


def nms(
    rows: ArrayLike, scores: ArrayLike, threshold: float, *, before: int | None = None, after: int | None = None
) -> Indices:
    """Return which rectangles [n, 5] stay, best score first: each suppresses later ones of IoU over `threshold`.

    Only the `before` best take part and at most `after` come out. Equal scores keep their order.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:before]
    ranked = _rows(rows, 5)[order]
    over = _exceeds(ranked, threshold)
    alive, kept = np.ones(len(order), bool), []
    for index in range(len(order)):
        if alive[index]:
            kept.append(index)
            alive &= ~over[index]
        if after is not None and len(kept) == after:
            break
    return order[np.array(kept, np.int64)]


def suppress_center(
    found: Detections, thresholds: Sequence[float] = CENTER_THRESHOLDS, *, before: int = 4096, after: int = 500
) -> Detections:
    """Return what the centre head reports: per class, by the authors' rectangles, listed class by class.

    Candidates with label 0 are no boxes and dropped, here and in `suppress_crowded`.
    """
    kept = []
    for label, threshold in enumerate(thresholds, start=1):
        own = np.flatnonzero(found.labels == label)
        rows = rectangles(found.boxes[own], center_head=True)
        kept.append(own[nms(rows, found.scores[own], threshold, before=before, after=after)])
    return found.take(np.concatenate([np.empty(0, np.int64), *kept]))


def suppress_crowded(found: Detections, thresholds: dict[int, float] | None = None) -> Detections:
    """Return what the TransFusion head reports: some classes (counted from 0) suppressed, in the order given."""
    kept = found.labels > 0
    for index, threshold in (CROWDED_THRESHOLDS if thresholds is None else thresholds).items():
        own = np.flatnonzero(found.labels == index + 1)
        kept[own] = False
        kept[own[nms(rectangles(found.boxes[own]), found.scores[own], threshold)]] = True
    return found.take(np.flatnonzero(kept))


def match(found: Detections, expected: Detections, iou: float = 0.99, *, flat: bool = False) -> Match:
    """Pair detections of equal label one to one, the closest first, at a 3-D (`flat`: bird's-eye) IoU of `iou`.

    Among pairs that overlap equally well the one with the nearer scores is taken.
    """
    a, b = found.boxes[:, :7], expected.boxes[:, :7]
    overlap = bev_iou(rectangles(a), rectangles(b)) if flat else box_iou(a, b)
    close = (overlap >= iou) & (found.labels[:, None] == expected.labels)
    row, column = np.nonzero(close)
    difference = np.abs(found.scores[row].astype(np.float64) - expected.scores[column])
    free_row, free_column, matched, greatest = np.ones(len(a), bool), np.ones(len(b), bool), 0, 0.0
    # IoU of equal boxes differs in the last digits, which must not decide.
    for pair in np.lexsort((difference, -overlap[row, column].round(6))):
        if free_row[row[pair]] and free_column[column[pair]]:
            free_row[row[pair]] = free_column[column[pair]] = False
            matched, greatest = matched + 1, max(greatest, float(difference[pair]))
    return Match(len(a), len(b), matched, greatest)


def corners(rows: ArrayLike) -> Array:
    """Return the corners [n, 4, 2] of rectangles [n, 5], counter-clockwise."""
    rect = _rows(rows, 5)
    cos, sin = np.cos(rect[:, 4:]), np.sin(rect[:, 4:])
    along = rect[:, 2:3] / 2 * np.array([1, -1, -1, 1])
    across = rect[:, 3:4] / 2 * np.array([1, 1, -1, -1])
    turned: Array = np.stack([along * cos - across * sin, along * sin + across * cos], -1)
    return turned + rect[:, None, :2]


def _exceeds(rows: Array, threshold: float) -> NDArray[np.bool_]:
    """Return [n, n]: whether the IoU of a rectangle with a later one is over `threshold`; false for earlier ones."""
    area = _product(rows, 2, 4)
    first, second = np.nonzero(np.triu(_near(rows, rows), 1))
    # The smaller area over the larger one bounds the IoU.
    small, large = np.minimum(area[first], area[second]), np.maximum(area[first], area[second])
    possible = small >= threshold * large
    first, second = first[possible], second[possible]
    shared = _clipped_areas(rows, rows, first, second)
    over = np.zeros((len(rows), len(rows)), bool)
    over[first, second] = _ratio(shared, area[first] + area[second] - shared) > threshold
    return over


def _shared_area(a: Array, b: Array) -> Array:
    """Return the common area [n, m]."""
    area = np.zeros((len(a), len(b)))
    row, column = np.nonzero(_near(a, b))
    area[row, column] = _clipped_areas(a, b, row, column)
    return area


def _near(a: Array, b: Array) -> NDArray[np.bool_]:
    """Return whether the circles around rectangles [n, 5] and [m, 5] meet: [n, m]."""
    reach = (np.hypot(a[:, 2], a[:, 3])[:, None] + np.hypot(b[:, 2], b[:, 3])) / 2
    x, y = a[:, None, 0] - b[:, 0], a[:, None, 1] - b[:, 1]
    near: NDArray[np.bool_] = x * x + y * y < reach * reach
    return near


def _clipped_areas(a: Array, b: Array, row: Indices, column: Indices) -> Array:
    """Return the common areas [p] of pairs, a piece at a time."""
    pieces = range(0, len(row), _PAIRS_AT_ONCE)
    areas = [
        _clipped_area(a[row[start : start + _PAIRS_AT_ONCE]], b[column[start : start + _PAIRS_AT_ONCE]])
        for start in pieces
    ]
    return np.concatenate([np.empty(0), *areas])


def _clipped_area(a: Array, b: Array) -> Array:
    """Return the common area [n] of pairs of rectangles [n, 5]: the first cut by each side of the second."""
    # In the frame of the second rectangle its sides lie along the axes.
    cos, sin = np.cos(b[:, 4]), np.sin(b[:, 4])
    x, y = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    polygon = corners(np.column_stack([cos * x + sin * y, cos * y - sin * x, a[:, 2:4], a[:, 4] - b[:, 4]]))
    for axis in (0, 1):
        for side in (1, -1):
            polygon = _cut(polygon, b[:, 2 + axis, None] / 2 - side * polygon[:, :, axis])
    following = np.roll(polygon, -1, 1)
    cross = polygon[:, :, 0] * following[:, :, 1] - polygon[:, :, 1] * following[:, :, 0]
    area: Array = cross.sum(1) / 2
    return area.clip(0)


def _cut(polygon: Array, distance: Array) -> Array:
    """Return convex polygons [n, k + 1, 2]: the parts of [n, k, 2] whose signed `distance` [n, k] is not negative.

    Every corner gives itself and a crossing to the next one; what exists moves to the front, keeping its order, and
    the rest repeats the first corner, which adds no area.
    """
    inside, ahead = distance >= -_ON_EDGE, np.roll(distance, -1, 1)
    crosses = inside != np.roll(inside, -1, 1)
    share = (distance / np.where(crosses, distance - ahead, 1.0)).clip(0, 1)
    crossing = polygon + share[..., None] * (np.roll(polygon, -1, 1) - polygon)
    count = polygon.shape[1]
    points = np.stack([polygon, crossing], 2).reshape(-1, 2 * count, 2)
    exists = np.stack([inside, crosses], 2).reshape(-1, 2 * count)
    order = np.argsort(~exists, axis=1, kind="stable")[:, : count + 1]
    points, exists = np.take_along_axis(points, order[..., None], 1), np.take_along_axis(exists, order, 1)
    return np.where(exists[..., None], points, points[:, :1])


def _rows(values: ArrayLike, columns: int) -> Array:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or rows.shape[1] < columns:
        raise ValueError(f"expects rows of at least {columns} numbers, got shape {list(rows.shape)}")
    return rows


def _product(rows: Array, start: int, stop: int) -> Array:
    product: Array = rows[:, start:stop].prod(1)
    return product


def _ratio(shared: Array, whole: Array) -> Array:
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
