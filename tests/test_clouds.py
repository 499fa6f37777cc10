"""Point clouds: files and their faults, seeded sweeps, and the capacities that they need."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeattn.clouds import (
    DENSITIES,
    Stage,
    VoxelSpec,
    check_points,
    count_needs,
    list_clouds,
    load_cloud,
    overflow,
    propose,
    seeded_cloud,
)
from edgeattn.errors import UsageError
from edgeattn.kernels._voxels import partition, pool, voxels_of

GOLDEN = Path(__file__).parent / "golden"
_SHIFTS = ((0, 0, 0), (6, 6, 0))
_HEIGHTS = ((32, 1), (8, 4), (2, 4), (1, 2))
SPECS = {
    "waymo_pillar": VoxelSpec(
        (-74.88, -74.88, -2.0), (0.32, 0.32, 6.0), (468, 468, 1), 36, (Stage(((12, 12, 1), (24, 24, 1)), _SHIFTS),)
    ),
    "waymo_voxel": VoxelSpec(
        (-74.88, -74.88, -2.0), (0.32, 0.32, 0.1875), (468, 468, 32), 48,
        tuple(Stage(((12, 12, z), (24, 24, z)), _SHIFTS, (1, 1, stride)) for z, stride in _HEIGHTS),
    ),
    "nuscenes_pillar": VoxelSpec(
        (-54.0, -54.0, -5.0), (0.3, 0.3, 8.0), (360, 360, 1), 90,
        (Stage(((30, 30, 1), (30, 30, 1)), ((0, 0, 0), (15, 15, 0))),), axes=2, ground=-1.8,
    ),
}  # fmt: skip
each_spec = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
POINTS = np.random.default_rng(0).uniform(-1, 1, (12, 5)).astype(np.float32)


def failure(function, code):
    with pytest.raises(UsageError) as caught:
        function()
    assert caught.value.code == code
    return str(caught.value)


def save(folder, kind, points=POINTS):
    path = folder / f"cloud.{kind}"
    if kind == "bin":
        points.astype("<f4").tofile(path)
    elif kind == "npy":
        np.save(path, points)
    else:
        np.savez(path, points=points)
    return path


@pytest.mark.parametrize("kind", ["bin", "npy", "npz"])
@pytest.mark.parametrize("count", [12, 1, 0])
def test_every_format(kind, count, tmp_path):
    found = load_cloud(save(tmp_path, kind, POINTS[:count]))
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(found, POINTS[:count])


def test_other_floats_columns_and_layouts(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(POINTS.astype(np.float64)))
    np.testing.assert_array_equal(load_cloud(tmp_path / "a.npy"), POINTS)
    np.savez(tmp_path / "b.npz", sweep=POINTS[:, :4].astype(np.float16))
    np.testing.assert_array_equal(load_cloud(tmp_path / "b.npz", 4), POINTS[:, :4].astype(np.float16))
    np.savez(tmp_path / "c.npz", boxes=np.zeros((3, 7)), points=POINTS)
    np.testing.assert_array_equal(load_cloud(tmp_path / "c.npz"), POINTS)


def test_wrong_columns(tmp_path):
    assert "got [12 x 4]" in failure(lambda: load_cloud(save(tmp_path, "npy", POINTS[:, :4])), "EA0146")
    message = failure(lambda: load_cloud(save(tmp_path, "bin", POINTS[:7, :4])), "EA0146")
    assert "112 bytes are no rows of 5 float32" in message
    assert "rows of 4 or 7 values" in message
    (tmp_path / "odd.bin").write_bytes(b"abc")
    assert "try" not in failure(lambda: load_cloud(tmp_path / "odd.bin"), "EA0146")
    assert "expects [points x 5], got [60]" in failure(lambda: check_points(POINTS.ravel()), "EA0146")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["bin", "npy", "npz"])
def test_values_that_are_none(kind, value, tmp_path):
    points = POINTS.copy()
    points[3, 1] = points[3, 4] = points[7, 0] = value
    message = failure(lambda: load_cloud(save(tmp_path, kind, points)), "EA0147")
    assert "2 of 12 points" in message
    assert "row 3" in message


def test_values_beyond_float32_are_infinite():
    points = POINTS.astype(np.float64)
    points[5, 2] = 1e300
    assert "1 of 12 points" in failure(lambda: check_points(points), "EA0147")


def test_whole_numbers_are_refused(tmp_path):
    assert "got int32" in failure(lambda: load_cloud(save(tmp_path, "npy", POINTS.astype(np.int32))), "EA0146")


def test_files_that_are_no_clouds(tmp_path):
    assert "no such point cloud" in failure(lambda: load_cloud(tmp_path / "a.bin"), "EA0146")
    assert "a folder" in failure(lambda: load_cloud(tmp_path), "EA0146")
    (tmp_path / "a.pcd").write_text("VERSION .7")
    assert ".bin .npy .npz" in failure(lambda: load_cloud(tmp_path / "a.pcd"), "EA0146")
    np.savez(tmp_path / "a.npz", first=POINTS, second=POINTS)
    assert "it holds first, second" in failure(lambda: load_cloud(tmp_path / "a.npz"), "EA0146")
    np.savez(tmp_path / "none.npz")
    assert "no array" in failure(lambda: load_cloud(tmp_path / "none.npz"), "EA0146")
    np.save(tmp_path / "pickle.npy", np.array([object()]), allow_pickle=True)
    assert "cannot be read" in failure(lambda: load_cloud(tmp_path / "pickle.npy"), "EA0146")


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("size", [0, 40, 150])
def test_truncated_files(kind, size, tmp_path):
    path = save(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot be read" in failure(lambda: load_cloud(path), "EA0146")


def test_list_of_a_folder(tmp_path):
    for name in ("b/2.bin", "a.npy", "b/1.BIN", "notes.txt", ".hidden.bin", ".cache/3.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.relative_to(tmp_path).as_posix() for path in list_clouds(tmp_path)] == ["a.npy", "b/1.BIN", "b/2.bin"]
    (tmp_path / "empty").mkdir()
    assert "no point clouds" in failure(lambda: list_clouds(tmp_path / "empty"), "EA0140")
    assert "no such folder" in failure(lambda: list_clouds(tmp_path / "absent"), "EA0140")


@each_spec
def test_seeded_sweeps_look_like_sweeps(spec):
    cloud = seeded_cloud(3, DENSITIES["sparse"], spec)
    assert check_points(cloud).shape == (DENSITIES["sparse"], 5)
    extent = np.array(spec.size) * spec.grid
    cell = (cloud[:, :3] - spec.low) / extent
    outside = ((cell < 0) | (cell >= 1)).any(1).mean()
    assert 0.0005 < outside < 0.15
    ground = np.abs(cloud[:, 2] - spec.ground) < 0.1
    assert 0.5 < ground.mean() < 0.95
    assert (cloud[:, 2] > spec.ground + 2.0).any(), "walls and vans reach over the sensor"
    # Rings: on the ground the points gather at few distances from the sensor.
    near = np.linalg.norm(cloud[ground][:, :2], axis=1)
    filled, _ = np.histogram(near, np.arange(5.0, 60.0, 0.1))
    assert (filled == 0).mean() > 0.2
    assert 0 <= cloud[:, 3:].min() < cloud[:, 3:].max() < 1


def test_seeded_sweeps_depend_on_the_arguments_alone():
    spec = SPECS["waymo_pillar"]
    np.testing.assert_array_equal(seeded_cloud(1, 5000, spec), seeded_cloud(1, 5000, spec))
    assert not np.array_equal(seeded_cloud(1, 5000, spec), seeded_cloud(2, 5000, spec))
    assert [len(seeded_cloud("a", count, spec)) for count in (0, 1, 17)] == [0, 1, 17]


def test_seeded_densities():
    spec = SPECS["waymo_pillar"]
    voxels = [count_needs(seeded_cloud(0, count, spec), spec)["voxels_0"] for count in DENSITIES.values()]
    # A frame of the data set has about 24,600.
    assert 5_000 < voxels[0] < voxels[1] < voxels[2] < 35_000


@each_spec
@pytest.mark.parametrize("count", [0, 1, 100, 20_000])
def test_needs_are_those_of_the_dynamic_partition(spec, count):
    cloud = seeded_cloud(7, count, spec)
    found = count_needs(cloud, spec)
    grid = spec.grid
    _, coords = voxels_of(torch.from_numpy(cloud), spec.low, spec.size, grid, spec.axes)
    expected = {"points": count}
    for number, stage in enumerate(spec.stages):
        if stage.stride != (1, 1, 1):
            _, coords = pool(coords, grid, stage.stride)
            grid = tuple(-(-cells // step) for cells, step in zip(grid, stage.stride, strict=True))
        expected[f"voxels_{number}"] = len(coords)
        for index, (window, shift) in enumerate(zip(stage.windows, stage.shifts, strict=True)):
            inds = partition(coords, grid, window, shift, spec.set_size)[0]
            expected[f"sets_{number}_{index}"] = inds.shape[1]
    assert found == expected


def test_needs_agree_with_golden(monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN))
    import cloud

    monkeypatch.delitem(sys.modules, "cloud")
    monkeypatch.delitem(sys.modules, "fill")
    found = count_needs(cloud.make_cloud(28, 20000, "waymo_pillar"), SPECS["waymo_pillar"])
    assert found == {"points": 19505, "voxels_0": 9137, "sets_0_0": 941, "sets_0_1": 494}


def test_points_off_the_range_need_nothing():
    cloud = np.full((10, 5), 1e4, np.float32)
    spec = SPECS["waymo_pillar"]
    assert count_needs(cloud, spec) == {"points": 10, "voxels_0": 0, "sets_0_0": 0, "sets_0_1": 0}


def test_height_is_tested_on_three_axes_only():
    high = np.array([[0.0, 0.0, 100.0, 0.0, 0.0]], np.float32)
    assert count_needs(high, SPECS["waymo_pillar"])["voxels_0"] == 0
    assert count_needs(high, SPECS["nuscenes_pillar"])["voxels_0"] == 1


def test_proposal():
    needs = [{"points": value, "voxels_0": value // 10} for value in range(1, 201)]
    found = propose(needs, margin=0.1, multiple=64)
    assert list(found) == ["points", "voxels_0"]
    points = found["points"]
    assert (points.p50, points.p95, points.p99, points.largest, points.capacity) == (101, 191, 199, 200, 256)
    assert found["voxels_0"].capacity == 64
    capacities = {name: need.capacity for name, need in found.items()}
    assert overflow(needs, capacities) == {"points": 0.0, "voxels_0": 0.0, "any": 0.0}


def test_proposal_of_an_exact_multiple_and_of_nothing():
    assert propose([{"points": 128}], margin=0.0, multiple=64)["points"].capacity == 128
    assert propose([{"points": 129}], margin=0.0, multiple=64)["points"].capacity == 192
    assert propose([{"points": 0}])["points"].capacity == 64
    with pytest.raises(ValueError, match="no clouds"):
        propose([])


def test_share_of_clouds_that_overflow():
    needs = [{"points": value, "voxels_0": 10 - value} for value in range(1, 11)]
    found = overflow(needs, {"points": 8, "voxels_0": 6})
    assert found == {"points": 0.2, "voxels_0": 0.3, "any": 0.5}
    assert overflow(needs, {"points": 8}) == {"points": 0.2, "any": 0.2}
    assert overflow([], {"points": 8}) == {"points": 0.0, "any": 0.0}
