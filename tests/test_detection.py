"""A detector's two ends on the host: clouds into inputs, candidates into detections, two results into one order."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import registered, tiny_cloud

from edgeattn import detection
from edgeattn.detection import Detector, align, detect, losses, pack, refuse_losses, seeded_feeds, space
from edgeattn.errors import UsageError
from edgeattn.model import MODELS
from edgeattn.source import resolve
from edgeattn.tensors import TensorSpec

tiny = registered("pillar")


def cloud_spec(name):
    return resolve(name).inputs[0]


@pytest.fixture(scope="module")
def spec(tiny):
    return cloud_spec(tiny)


class TestPack:
    def test_zeros_behind_the_points_and_their_number(self, spec):
        cloud = tiny_cloud(7)
        feeds, count = pack(cloud, spec)
        assert (feeds["points"].shape, feeds["points"].dtype, count) == ((2000, 5), np.float32, 7)
        np.testing.assert_array_equal(feeds["points"][:7], cloud)
        assert not feeds["points"][7:].any()
        assert feeds["num_points"].tolist() == [7]
        assert feeds["num_points"].dtype == np.int32

    def test_points_beyond_the_capacity_are_left_out(self, spec):
        cloud = tiny_cloud(2001)
        feeds, count = pack(cloud, spec)
        assert (count, feeds["num_points"].tolist()) == (2001, [2000])
        np.testing.assert_array_equal(feeds["points"], cloud[:2000])

    def test_the_cloud_is_not_changed(self, spec):
        cloud = tiny_cloud(2000)
        feeds, _ = pack(cloud, spec)
        feeds["points"][:] = 0
        np.testing.assert_array_equal(cloud, tiny_cloud(2000))


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.detector])
def test_space_survives_the_manifest(name):
    """What the host reads of a bundle is what the catalogue says, to the last digit."""
    spec = cloud_spec(name)
    stored = TensorSpec.from_dict(json.loads(json.dumps(spec.as_dict())))
    assert space(stored.cloud) == MODELS.get(name).inputs[0].cloud.space
    assert stored.cloud["voxels"] == list(MODELS.get(name).build().capacity.voxels)


def test_seeded_clouds_fit_and_take_turns(spec):
    feeds = [seeded_feeds(f"0/{turn}", spec) for turn in range(2)]
    assert not np.array_equal(feeds[0]["points"], feeds[1]["points"])
    np.testing.assert_array_equal(feeds[0]["points"], seeded_feeds("0/0", spec)["points"])
    small = dataclasses.replace(spec, cloud={**spec.cloud, "voxels": [20], "sets": [[3, 3]]})
    count = int(seeded_feeds(0, small)["num_points"][0])
    assert 0 < count < 2000
    points = seeded_feeds(0, small)["points"][:count]
    assert detection._fits(points, small)


class TestLosses:
    def test_nothing_lost(self, spec):
        assert losses(2000, [800, 96, 80], spec) == []

    def test_every_capacity(self, spec):
        assert losses(2005, [801, 97, 180], spec) == [
            "points: 2005 found, 2000 fit, 5 lost",
            "voxels of stage 0: 801 found, 800 fit, 1 lost",
            "sets of stage 0, shift 0: 97 found, 96 fit, 1 lost",
            "sets of stage 0, shift 1: 180 found, 80 fit, 100 lost",
        ]

    def test_stages_are_told_apart(self):
        voxels = dataclasses.replace(
            cloud_spec("dsvt_waymo_pillar"),
            cloud={"voxels": [10, 20], "sets": [[1, 2], [3, 4]]},
        )
        assert losses(0, [10, 21, 1, 3, 3, 4], voxels) == [
            "voxels of stage 1: 21 found, 20 fit, 1 lost",
            "sets of stage 0, shift 1: 3 found, 2 fit, 1 lost",
        ]


def candidates(count=6, width=7, empty=2):
    """Return outputs of a detector: boxes well apart, and `empty` places without a box."""
    rng = np.random.default_rng(3)
    boxes = rng.uniform(1, 3, (count + empty, width)).astype(np.float32)
    boxes[:, :2] = 5.0 * np.arange(count + empty)[:, None]
    boxes[:, 6] = rng.uniform(-3, 3, count + empty)
    labels = np.arange(count + empty, dtype=np.int32) % 3 + 1
    boxes[count:], labels[count:] = 0, 0
    scores = np.where(labels > 0, np.linspace(0.9, 0.2, count + empty), 0).astype(np.float32)
    return dict(boxes=boxes, scores=scores, labels=labels, counts=np.array([5, 2, 1], np.int32))


def changed(outputs, name, rows, value):
    """Return the outputs with some places of one of them set to `value`."""
    array = outputs[name].copy()
    array[rows] = value
    return {**outputs, name: array}


class TestAlign:
    def test_of_equals_changes_nothing_but_leaves_out_what_is_no_box(self):
        found, expected, share = align(candidates(), candidates())
        assert share == 1.0
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(found[name], candidates()[name][:6])
            np.testing.assert_array_equal(expected[name], candidates()[name][:6])
        np.testing.assert_array_equal(found["counts"], [5, 2, 1])

    def test_swapped_ranks(self):
        order = [1, 0, 2, 7, 4, 3, 5, 6]
        mixed = {name: value[order] if name != "counts" else value for name, value in candidates().items()}
        found, expected, share = align(mixed, candidates())
        assert share == 1.0
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(expected["scores"], candidates()["scores"][:6])

    def test_heading_of_pi_on_either_side(self):
        ours = changed(candidates(), "boxes", (slice(0, 2), 6), [np.pi - 1e-3, -np.pi])
        theirs = changed(candidates(), "boxes", (slice(0, 2), 6), [-np.pi + 1e-3, np.pi])
        found, expected, share = align(ours, theirs)
        assert share == 1.0
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=3e-3)

    def test_missing_and_moved_boxes_lower_the_share(self):
        less = changed(candidates(), "labels", [1], 0)
        found, expected, share = align(less, candidates())
        assert share == pytest.approx(5 / 6)
        np.testing.assert_array_equal(found["boxes"], expected["boxes"])
        assert align(candidates(), less)[2] == pytest.approx(5 / 6)
        moved = changed(candidates(), "boxes", (2, 0), 50.0)
        assert align(moved, candidates())[2] == pytest.approx(5 / 6)
        turned = changed(candidates(), "boxes", (3, 6), candidates()["boxes"][3, 6] + np.pi)
        assert align(turned, candidates())[2] == pytest.approx(5 / 6)

    def test_another_class_is_another_box(self):
        other = changed(candidates(), "labels", [0], 3)
        assert align(other, candidates())[2] == pytest.approx(5 / 6)

    def test_a_box_is_paired_once(self):
        twice = changed(candidates(), "boxes", [1], candidates()["boxes"][0])
        twice = changed(twice, "labels", [1], 1)
        found, expected, share = align(twice, candidates())
        assert share == pytest.approx(5 / 6)
        assert len(found["boxes"]) == len(expected["boxes"]) == 5

    def test_the_closest_is_taken(self):
        near = candidates(2, empty=0)
        near = changed(near, "boxes", [1], near["boxes"][0])
        near = changed(near, "boxes", (1, 0), near["boxes"][0, 0] + 0.05)
        near = changed(near, "labels", [1], 1)
        other = {name: value[::-1] if name != "counts" else value for name, value in near.items()}
        found, expected, share = align(other, near)
        assert share == 1.0
        np.testing.assert_array_equal(found["boxes"], expected["boxes"])

    @pytest.mark.parametrize(("ours", "theirs", "wanted"), [(0, 0, 1.0), (0, 3, 0.0), (3, 0, 0.0)])
    def test_nothing_found(self, ours, theirs, wanted):
        found, expected, share = align(candidates(ours), candidates(theirs))
        assert share == wanted
        assert len(found["boxes"]) == len(expected["boxes"]) == 0


def test_detect_suppresses_and_warns(spec):
    detector = Detector(("a", "b", "c"), "center")
    outputs = candidates()
    outputs["boxes"][3] = outputs["boxes"][0]  # the same class at the same place, with a lower score
    found = detect(outputs, detector, spec, 2001)
    assert len(found) == 5
    assert sorted(found.name) == ["a", "b", "b", "c", "c"]
    assert found.warnings == ("points: 2001 found, 2000 fit, 1 lost",)
    with pytest.raises(UsageError, match=r"EA0148.*points: 2001 found"):
        refuse_losses(found)
    assert refuse_losses(detect(outputs, detector, spec, 2000)).warnings == ()


def test_detect_finds_nothing_in_nothing(spec):
    """A head has opinions on an empty map too; they are no detections."""
    outputs = {**candidates(), "counts": np.array([0, 0, 0], np.int32)}
    assert len(detect(outputs, Detector(("a", "b", "c"), "center"), spec, 10)) == 0
