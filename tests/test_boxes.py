"""Rotated boxes on the host: overlap against another method, suppression against the golden file, matching."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgeattn.boxes import (
    Detections,
    bev_iou,
    box_iou,
    corners,
    match,
    nms,
    rectangles,
    suppress_center,
    suppress_crowded,
)

FILES = Path(__file__).parent / "golden" / "ops"
CASES = json.loads((FILES / "center_decode.json").read_text())["cases"]
each_case = pytest.mark.parametrize("case", list(CASES))
SQUARE = [0.0, 0.0, 2.0, 2.0, 0.0]


def golden(case):
    stored = np.load(FILES / "center_decode.npz")
    return {key.split(".")[1]: stored[key] for key in stored.files if key.startswith(f"{case}.")}


def random_boxes(count, spread, seed=0, columns=7):
    """Return boxes of vehicle size [n, columns] in a square of `spread` metres, any heading."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0, 1, (count, columns))
    boxes[:, :2] = 60 + spread * boxes[:, :2]
    boxes[:, 3:6] = 0.5 + 4 * boxes[:, 3:6]
    boxes[:, 6] = 4 * np.pi * (boxes[:, 6] - 0.5)
    return boxes


def detections(count, spread=12.0, classes=3, seed=0, columns=7):
    rng = np.random.default_rng(seed + 1)
    labels = rng.integers(0, classes + 1, count).astype(np.int32)
    boxes = random_boxes(count, spread, seed, columns)
    return Detections(boxes.astype(np.float32), rng.uniform(0, 1, count).astype(np.float32), labels)


def plain_iou(a, b):
    """IoU of two rectangles by another way: corners inside the other and crossings of sides, ordered by angle."""
    first, second = corners([a])[0], corners([b])[0]
    points = [p for p in first if _holds(b, p)] + [p for p in second if _holds(a, p)]
    for i, j in itertools.product(range(4), range(4)):
        points += _crossing(first[i], first[(i + 1) % 4], second[j], second[(j + 1) % 4])
    if len(points) < 3:
        return 0.0
    middle = np.mean(points, 0)
    points.sort(key=lambda p: math.atan2(p[1] - middle[1], p[0] - middle[0]))
    following = points[1:] + points[:1]
    shared = sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(points, following, strict=True)) / 2
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def _holds(rect, point):
    x, y = point[0] - rect[0], point[1] - rect[1]
    cos, sin = math.cos(rect[4]), math.sin(rect[4])
    return abs(cos * x + sin * y) <= rect[2] / 2 and abs(cos * y - sin * x) <= rect[3] / 2


def _crossing(p, q, r, s):
    along, other = q - p, s - r
    area = along[0] * other[1] - along[1] * other[0]
    if abs(area) < 1e-12:
        return []
    apart = r - p
    t = (apart[0] * other[1] - apart[1] * other[0]) / area
    u = (apart[0] * along[1] - apart[1] * along[0]) / area
    return [p + t * along] if 0 <= t <= 1 and 0 <= u <= 1 else []


def plain_nms(rows, scores, threshold):
    """Suppression as its definition has it, pair by pair."""
    kept = []
    for index in sorted(range(len(rows)), key=lambda i: -scores[i]):
        if all(plain_iou(rows[other], rows[index]) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize(
    ("other", "expected"),
    {
        "same": (SQUARE, 1.0),
        "same, turned by a quarter": ([0, 0, 2, 2, math.pi / 2], 1.0),
        "same, sides swapped and turned": ([0, 0, 2, 2, -math.pi / 2], 1.0),
        "far": ([10, 0, 2, 2, 0], 0.0),
        "near, circles meet": ([2.3, 0, 2, 2, 0], 0.0),
        "touching along a side": ([2, 0, 2, 2, 0], 0.0),
        "touching at a corner": ([2, 2, 2, 2, 0], 0.0),
        "half": ([1, 0, 2, 2, 0], 1 / 3),
        "inside": ([0.25, -0.25, 1, 1, 0], 0.25),
        "inside, turned": ([0, 0, 1, 1, 0.6], 0.25),
        "inside, sharing a side": ([0.5, 0, 1, 2, 0], 0.5),
        "turned by an eighth": ([0, 0, 2, 2, math.pi / 4], 1 / math.sqrt(2)),
        "diamond on a side": ([1, 0, math.sqrt(2), math.sqrt(2), math.pi / 4], 0.2),
        "no area": ([0, 0, 0, 0, 0], 0.0),
    }.values(),
    ids=lambda value: None,
)
def test_overlap_of_simple_rectangles(other, expected):
    assert bev_iou([SQUARE], [other])[0, 0] == pytest.approx(expected, abs=1e-9)
    assert bev_iou([other], [SQUARE])[0, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spread", [1.0, 6.0, 30.0])
def test_overlap_of_random_rectangles(spread):
    a, b = rectangles(random_boxes(25, spread, 1)), rectangles(random_boxes(20, spread, 2))
    expected = [[plain_iou(p, q) for q in b] for p in a]
    np.testing.assert_allclose(bev_iou(a, b), expected, atol=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, -2.5, math.pi])
def test_overlap_survives_rounding(angle):
    """Nearly shared sides, at coordinates as large as a range: the area must not jump."""
    base = np.array([75.0, -75.0, 4.6, 1.9, angle])
    for scale in (1e-6, 1e-8, 1e-9, 1e-10, 1e-13, 1e-15):
        noise = np.random.default_rng(0).uniform(-scale, scale, (200, 5))
        found = bev_iou([base], base + noise)
        assert found.min() >= 1 - 20 * scale - 1e-9
        assert found.max() <= 1 + 1e-9


def test_overlap_of_nobody():
    assert bev_iou(np.empty((0, 5)), [SQUARE]).shape == (0, 1)
    assert bev_iou([SQUARE], np.empty((0, 5))).shape == (1, 0)
    with pytest.raises(ValueError, match="at least 5 numbers"):
        bev_iou([[1.0, 2.0]], [SQUARE])


def test_overlap_in_space():
    box = np.array([1.0, 2.0, 0.5, 4.0, 2.0, 2.0, 0.7])
    lifted, above, longer = box.copy(), box.copy(), box.copy()
    lifted[2], above[2], longer[3] = 1.5, 2.6, 8.0
    found = box_iou([box], [box, lifted, above, longer])
    np.testing.assert_allclose(found, [[1.0, 1 / 3, 0.0, 0.5]], atol=1e-9)


@each_case
def test_overlap_agrees_with_golden(case):
    """The file gives x1, y1, x2, y2 and an angle that counts clockwise; its diagonal is left out."""
    given = golden(case)
    low, high, angle = given["nms_boxes"][:, :2], given["nms_boxes"][:, 2:4], given["nms_boxes"][:, 4:]
    found = bev_iou(
        np.hstack([(low + high) / 2, high - low, -angle]), np.hstack([(low + high) / 2, high - low, -angle])
    )
    np.fill_diagonal(found, 0)
    assert (given["nms_iou"] > 0.1).sum() > 50
    np.testing.assert_allclose(found, given["nms_iou"], atol=1e-5)
    # These are the rectangles of the first boxes of class 0.
    first = np.flatnonzero(given["labels"] == 0)[: len(angle)]
    own = rectangles(given["boxes"][first], center_head=True)
    np.testing.assert_allclose(own[:, :4], np.hstack([(low + high) / 2, high - low]), atol=2e-5)
    np.testing.assert_allclose(np.sin(own[:, 4:] + angle), 0, atol=1e-6)
    assert (np.cos(own[:, 4:] + angle) > 0).all()


@each_case
def test_center_suppression_agrees_with_golden(case):
    given, entry = golden(case), CASES[case]
    found = Detections(given["boxes"], given["rectified"], given["labels"] + 1)
    kept = suppress_center(found, entry["nms_thresh"], before=entry["nms_pre"], after=entry["nms_post"])
    np.testing.assert_array_equal(kept.boxes, given["final_boxes"])
    np.testing.assert_array_equal(kept.scores, given["final_scores"])
    np.testing.assert_array_equal(kept.labels, given["final_labels"])
    assert len(kept) < len(found)


def test_center_rectangles_are_turned_without_swapping():
    """Two 4 x 2 boxes with heading 0: 3 m apart along x they do not meet, along y they share a seventh."""
    boxes = np.array([[0, 0, 0, 4, 2, 1, 0], [3, 0, 0, 4, 2, 1, 0], [0, 3, 0, 4, 2, 1, 0]], float)
    found = bev_iou(*[rectangles(boxes, center_head=True)] * 2)[0]
    np.testing.assert_allclose(found, [1, 0, 1 / 7], atol=1e-9)
    np.testing.assert_allclose(bev_iou(*[rectangles(boxes)] * 2)[0], [1, 1 / 7, 0], atol=1e-9)


@pytest.mark.parametrize("threshold", [0.1, 0.55, 0.9])
def test_suppression_is_its_definition(threshold):
    rows = rectangles(random_boxes(60, 8.0, 3))
    scores = np.random.default_rng(4).uniform(0, 1, 60)
    found = nms(rows, scores, threshold)
    assert found.tolist() == plain_nms(rows, scores, threshold)
    assert nms(rows, scores, threshold, after=5).tolist() == found[:5].tolist()
    best = np.argsort(-scores)[:20]
    assert nms(rows, scores, threshold, before=20).tolist() == [
        best[i] for i in nms(rows[best], scores[best], threshold)
    ]


def test_equal_scores_keep_their_order():
    assert nms([SQUARE] * 4, [0.5] * 4, 0.5).tolist() == [0]
    far = [[10.0 * place, 0, 2, 2, 0] for place in range(4)]
    assert nms(far, [0.5] * 4, 0.5).tolist() == [0, 1, 2, 3]
    assert nms(np.empty((0, 5)), [], 0.5).tolist() == []


def test_center_suppression_is_per_class():
    found = detections(120)
    kept = suppress_center(found, (0.3, 0.2, 0.1), after=9)
    place = 0
    for label, threshold in ((1, 0.3), (2, 0.2), (3, 0.1)):
        own = np.flatnonzero(found.labels == label)
        rows = rectangles(found.boxes[own], center_head=True)
        expected = own[plain_nms(rows, found.scores[own], threshold)][:9]
        np.testing.assert_array_equal(kept.boxes[place : place + len(expected)], found.boxes[expected])
        place += len(expected)
    assert place == len(kept) < (found.labels > 0).sum()


def test_crowded_suppression_leaves_other_classes_and_the_order():
    found = detections(150, classes=10, columns=9)
    kept = suppress_crowded(found)
    expected = [place for place in range(150) if 1 <= found.labels[place] <= 8]
    for label in (9, 10):
        own = np.flatnonzero(found.labels == label)
        stays = own[plain_nms(rectangles(found.boxes[own]), found.scores[own], 0.175)]
        assert len(stays) < len(own)
        expected += stays.tolist()
    np.testing.assert_array_equal(kept.boxes, found.boxes[sorted(expected)])
    np.testing.assert_array_equal(kept.labels, found.labels[sorted(expected)])


def test_no_detections_stay_none():
    none = Detections(np.empty((0, 7), np.float32), np.empty(0, np.float32), np.empty(0, np.int32))
    assert len(suppress_center(none)) == len(suppress_crowded(none)) == 0
    assert suppress_center(none).boxes.shape == (0, 7)
    dropped = Detections(np.zeros((3, 7), np.float32), np.zeros(3, np.float32), np.zeros(3, np.int32))
    assert len(suppress_center(dropped)) == len(suppress_crowded(dropped)) == 0


def test_fields_of_detections():
    found = Detections(
        np.arange(18, dtype=np.float32).reshape(2, 9), np.array([0.9, 0.8], np.float32), np.array([2, 5], np.int32),
        names=("car", "truck"), warnings=("3 points too many",),
    )  # fmt: skip
    columns = [found.x, found.y, found.z, found.dx, found.dy, found.dz, found.heading, found.vx, found.vy]
    np.testing.assert_array_equal(np.stack(columns, 1), found.boxes)
    assert found.score is found.scores
    assert found.label is found.labels
    assert found.name == ["truck", "5"]
    second = copy.deepcopy(found).take(np.array([1]))
    assert (len(second), second.x[0], second.warnings) == (1, 9.0, found.warnings)
    with pytest.raises(AttributeError, match="colour"):
        _ = found.colour
    with pytest.raises(AttributeError, match="vx"):
        _ = Detections(found.boxes[:, :7], found.scores, found.labels).vx


@pytest.mark.parametrize("flat", [False, True])
def test_match_of_the_same_in_another_order(flat):
    found = detections(80)
    shuffled = found.take(np.random.default_rng(0).permutation(80))
    result = match(found, shuffled, flat=flat)
    assert (result.found, result.expected, result.matched, result.share) == (80, 80, 80, 1.0)
    assert result.score_difference == 0


def test_match_counts_what_is_missing_extra_moved_or_of_another_class():
    found = detections(40, spread=400.0)
    assert match(found.take(slice(0, 30)), found).share == 0.75
    assert match(found, found.take(slice(0, 30))).share == 0.75
    moved, labels, scores = found.boxes.copy(), found.labels.copy(), found.scores.copy()
    moved[0, 0] += 0.1
    labels[1] += 1
    scores[2] += 0.25
    scores[0] += 0.5
    result = match(Detections(moved, scores, labels), found)
    assert result.matched == 38
    assert result.score_difference == pytest.approx(0.25, abs=1e-6)
    assert match(Detections(moved, scores, labels), found, iou=0.5).matched == 39


def test_match_pairs_one_to_one():
    one = Detections(
        np.array([[0, 0, 0, 4, 2, 1.5, 0.3]], np.float32), np.array([0.5], np.float32), np.ones(1, np.int32)
    )
    twice = Detections(one.boxes.repeat(2, 0), np.array([0.9, 0.5], np.float32), np.ones(2, np.int32))
    result = match(twice, one)
    assert (result.matched, result.share, result.score_difference) == (1, 0.5, 0.0)
    assert match(twice, twice).score_difference == 0


def test_match_in_height():
    one = Detections(
        np.array([[0, 0, 0, 4, 2, 1.5, 0.3]], np.float32), np.array([0.5], np.float32), np.ones(1, np.int32)
    )
    higher = Detections(one.boxes + np.array([0, 0, 0.5, 0, 0, 0, 0], np.float32), one.scores, one.labels)
    assert match(higher, one).matched == 0
    assert match(higher, one, flat=True).matched == 1


def test_match_of_nothing():
    none = detections(0)
    assert match(none, none).share == 1.0
    assert match(none, detections(3)).share == 0.0
