"""Detections of two runs over a stream of clouds: candidates in one order, and boxes matched after suppression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.boxes import Match, match
from edgeattn.detection import Detector, align, detect
from edgeattn.tensors import TensorSpec

Array = NDArray[Any]
Arrays = Mapping[str, Array]
# Two detections are the same from this 3-D overlap on.
IOU = 0.99


@dataclass
class Matching:
    """Running figures of a detector that takes clouds by `spec`: feed `update`, read `figures` at any time.

    Shares are over all samples together, so that a cloud with three boxes weighs less than one with three hundred.
    `boxes` are those of the worst sample: of PyTorch, and found.
    """

    detector: Detector
    spec: TensorSpec
    samples: int = 0
    score_difference: float = 0.0
    worst_sample: str = ""
    worst_share: float = 1.0
    boxes: tuple[Array, Array] = field(default_factory=lambda: (np.zeros((0, 7)), np.zeros((0, 7))))
    losses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_worst: bool = False
    _candidates: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))  # both have, larger side
    _detections: NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))  # + of PyTorch, found
    _worst: tuple[float, float] = (-1.0, 0.0)

    def update(self, sample: str, feeds: Arrays, expected: Arrays, found: Arrays) -> tuple[Arrays, Arrays]:
        """Add one sample and return both results with their candidates in one order.

        What has another form than expected, or is not finite, matches nothing and is returned as it is: `Comparison`
        then finds the fault.
        """
        self.samples += 1
        if not _comparable(expected, found):
            missing = max(1, int((expected["labels"] > 0).sum()))
            self._count(0, missing, Match(0, missing, 0, 0.0))
            self._rank(sample, 0.0, 0.0, (np.zeros((0, 7)), np.zeros((0, 7))))
            return expected, found
        ours, theirs, _ = align(found, expected)
        larger = max(int((side["labels"] > 0).sum()) for side in (found, expected))
        first, second = (detect(side, self.detector, self.spec, self._points(feeds)) for side in (found, expected))
        pairs = match(first, second, IOU)
        self._count(len(ours["labels"]), larger, pairs)
        self._rank(sample, pairs.share, pairs.score_difference, (second.boxes, first.boxes))
        if second.warnings:
            self.losses[sample] = second.warnings
        return theirs, ours

    def figures(self) -> dict[str, Any]:
        """Return the figures so far, as they stand in a report (see `schema_validate.json`)."""
        matched, larger, expected, found = self._detections.tolist()
        return {
            "samples": self.samples,
            "candidates": _share(*self._candidates.tolist()),
            "matched": _share(matched, larger),
            "iou": IOU,
            "boxes": {"expected": expected, "found": found, "matched": matched},
            "score_difference": self.score_difference,
            "worst_sample": self.worst_sample,
            "worst_share": self.worst_share,
        }

    def _points(self, feeds: Arrays) -> int:
        assert self.spec.cloud is not None
        return int(feeds[self.spec.cloud["count"]][0])

    def _count(self, both: int, larger: int, pairs: Match) -> None:
        self._candidates += (both, larger)
        self._detections += (pairs.matched, max(pairs.found, pairs.expected), pairs.expected, pairs.found)
        self.score_difference = max(self.score_difference, pairs.score_difference)

    def _rank(self, sample: str, share: float, difference: float, boxes: tuple[Array, Array]) -> None:
        self.is_worst = (1 - share, difference) > self._worst
        if self.is_worst:
            self._worst, self.worst_sample, self.worst_share = (1 - share, difference), sample, share
            self.boxes = boxes


def _comparable(expected: Arrays, found: Arrays) -> bool:
    return all(
        found[name].shape == value.shape and np.isfinite(value).all() and np.isfinite(found[name]).all()
        for name, value in expected.items()
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
