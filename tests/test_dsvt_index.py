"""DSVT's index operators: the golden partition, clouds of every size in ONNX Runtime, overflow, forbidden nodes."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, shape_inference

from edgeattn.clouds import Stage, VoxelSpec, seeded_cloud
from edgeattn.errors import UnsupportedError, UsageError
from edgeattn.export.lower import link_bodies
from edgeattn.export.parity import run_bytes, session
from edgeattn.export.translate import IR_VERSION, OPSET, register_schema
from edgeattn.kernels._voxels import partition, pool, voxels_of, windows_of
from edgeattn.op import DOMAIN, OPS
from edgeattn.testing import one_node_model

FILES = Path(__file__).parent / "golden" / "ops"
STORED = np.load(FILES / "dsvt_partition.npz")
CASES = json.loads((FILES / "dsvt_partition.json").read_text())["cases"]
each_case = pytest.mark.parametrize("case", list(CASES))
BANNED = {"Unique", "NonZero", "Sort", "Loop", "Scan", "If", "TopK", "CumSum", "Clip", "Compress", "ScatterND"}
INT32 = onnx.TensorProto.INT32

GROWN = (((12, 12, 1), (24, 24, 1)), ((0, 0, 0), (6, 6, 0)))
TALL = [(((12, 12, z), (24, 24, z)), GROWN[1]) for z in (32, 8, 2, 1)]
WIDE = (((30, 30, 1), (30, 30, 1)), ((0, 0, 0), (15, 15, 0)))
SPECS = {
    "waymo_pillar": VoxelSpec((-74.88, -74.88, -2.0), (0.32, 0.32, 6.0), (468, 468, 1), 36, (Stage(*GROWN),)),
    "waymo_voxel": VoxelSpec(
        (-74.88, -74.88, -2.0),
        (0.32, 0.32, 0.1875),
        (468, 468, 32),
        48,
        tuple(Stage(*each, (1, 1, step)) for each, step in zip(TALL, (1, 4, 4, 2), strict=True)),
    ),
    "nuscenes_pillar": VoxelSpec(
        (-54.0, -54.0, -5.0), (0.3, 0.3, 8.0), (360, 360, 1), 90, (Stage(*WIDE),), axes=2, ground=-1.8
    ),
}


def stages_of(case):
    """Yield (stage, grid, set size, windows, shifts) of a golden case, and the stride that leads to the stage."""
    layout = CASES[case]
    grid = layout["sparse_shape"]
    for stage, (window, (size, _)) in enumerate(zip(layout["window_shape"], layout["set_info"], strict=True)):
        stride = layout["downsample_stride"][stage - 1] if stage else None
        if stride:
            grid = [cells // step for cells, step in zip(grid, stride, strict=True)]
        grown = [cells * factor for cells, factor in zip(window, layout["hybrid_factor"], strict=True)]
        yield stage, grid, size, [window, grown], layout["shifts_list"][stage], stride


def golden(case, name):
    return torch.from_numpy(STORED[f"{case}.{name}"]).long()


def coords_at(case, stage):
    return golden(case, f"coords_s{stage}" if stage else "coords")


@each_case
def test_partition_agrees_with_golden(case):
    for stage, grid, size, windows, shifts, _ in stages_of(case):
        coords = coords_at(case, stage)
        for i in range(2):
            inds, slot, position, number = partition(coords, grid, windows[i], shifts[i], size)
            assert torch.equal(inds, golden(case, f"inds_s{stage}_shift{i}"))
            assert torch.equal(number, golden(case, f"win_s{stage}_shift{i}"))
            _, (ix, iy, iz) = windows_of(coords, grid, windows[i], shifts[i])
            assert torch.equal(torch.stack([iz, iy, ix], 1), golden(case, f"inwin_s{stage}_shift{i}"))
            wx, wy, _ = windows[i]
            assert torch.equal(position, (iz * wy + iy) * wx + ix)
            repeats = torch.zeros_like(inds, dtype=torch.bool)
            repeats[..., 1:] = inds[..., 1:] == inds[..., :-1]
            assert torch.equal(repeats.long(), golden(case, f"mask_s{stage}_shift{i}"))
            for axis in range(2):
                assert torch.equal(inds[axis].flatten()[slot[axis]], torch.arange(len(coords)))
                assert not repeats[axis].flatten()[slot[axis]].any()


def test_pool_agrees_with_golden():
    for stage, grid, _, _, _, stride in stages_of("voxel"):
        if stride:
            before = [cells * step for cells, step in zip(grid, stride, strict=True)]
            table, coords = pool(coords_at("voxel", stage - 1), before, stride)
            assert torch.equal(coords, coords_at("voxel", stage))
            home, slot = golden("voxel", f"pool_map_s{stage}"), golden("voxel", f"pool_slot_s{stage}")
            assert torch.equal(table[home, slot], torch.arange(len(home)))
            assert int((table >= 0).sum()) == len(home)


@each_case
def test_op_and_body_agree_with_the_partition(case):
    """One batch item at a time, as exported graphs take one cloud; exactly the golden sets where the batch is one."""
    for stage, grid, size, windows, shifts, _ in stages_of(case):
        everything = coords_at(case, stage)
        for item in range(CASES[case]["batch"]):
            coords = everything[everything[:, 0] == item]
            coords[:, 0] = 0
            rows = padded(coords, len(coords) + 9)
            rows[len(coords) :] = 1_000_003  # ignored, whatever it is
            inputs = [rows, torch.tensor([len(coords)], dtype=torch.int32)]
            for i in range(2):
                want = partition(coords, grid, windows[i], shifts[i], size)
                if CASES[case]["batch"] == 1:
                    assert torch.equal(want[0], golden(case, f"inds_s{stage}_shift{i}"))
                attributes = dict(grid=grid, window=windows[i], shift=shifts[i], set_size=size, max_sets=80)
                check_sets(OPS.get("set_partition")(*inputs, **attributes), want)
                check_sets(run_op("set_partition", inputs, attributes), want)


def padded(coords, rows):
    return torch.cat([coords, coords.new_zeros(rows - len(coords), 4)]).int()


def check_sets(found, want):
    """Compare fixed-capacity sets with those of the dynamic function; no capacity is exceeded."""
    inds, slot, position, num_sets = (torch.as_tensor(each).long() for each in found)
    sets, voxels, spare = want[0].shape[1], len(want[2]), slot.shape[1] - 1
    assert num_sets.tolist() == [sets]
    assert torch.equal(inds[:, :sets], want[0])
    assert (inds[:, sets:] == spare).all()
    assert torch.equal(slot[:, :voxels], want[1])
    assert torch.equal(position[:voxels], want[2])
    assert not slot[:, voxels:].any()
    assert not position[voxels:].any()


def run_op(name, inputs, attributes):
    """Return what the body of one op gives in ONNX Runtime, the sizes being static."""
    op = OPS.get(name)
    dims = op.signature.bind(name, [tensor.shape for tensor in inputs])
    model = link(one_node_model(op, dims, attributes, torch.float32))
    names = [tensor.name for tensor in op.signature.inputs]
    return run_bytes(model, {key: tensor.numpy() for key, tensor in zip(names, inputs, strict=True)})


def link(model):
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return ir.serde.serialize_model(link_bodies(ir.serde.deserialize_model(inferred))).SerializeToString()


def voxelize_attributes(spec, max_voxels):
    low = dict(zip(("low_x", "low_y", "low_z"), spec.low, strict=True))
    size = dict(zip(("size_x", "size_y", "size_z"), spec.size, strict=True))
    return {**low, **size, "grid": list(spec.grid), "axes": spec.axes, "max_voxels": max_voxels}


class Chain:
    """Points to the sets of every stage as one graph of our ops, and the same from the dynamic functions."""

    def __init__(self, spec, points, voxels, sets):
        self.spec, self.points, self.voxels, self.sets = spec, points, voxels, sets
        self.nodes, self.outputs = [], []
        self._node(
            "voxelize", ["points", "num_points"], ["voxel", "coords0", "num0"], voxelize_attributes(spec, voxels)
        )
        for stage, (grid, each) in enumerate(self.stages()):
            if stage:
                step = dict(stride=list(each.stride), slots=int(np.prod(each.stride)), max_voxels=voxels)
                before = [cells * part for cells, part in zip(grid, each.stride, strict=True)]
                last = [f"coords{stage - 1}", f"num{stage - 1}"]
                self._node(
                    "voxel_pool", last, [f"table{stage}", f"coords{stage}", f"num{stage}"], dict(grid=before, **step)
                )
            for i in range(2):
                names = [f"{name}{stage}{i}" for name in ("inds", "slot", "position", "sets")]
                layout = dict(window=list(each.windows[i]), shift=list(each.shifts[i]), set_size=spec.set_size)
                layout = dict(grid=grid, **layout, max_sets=sets)
                self._node("set_partition", [f"coords{stage}", f"num{stage}"], names, layout)
        self.session = session(self._graph())

    def stages(self):
        grid = list(self.spec.grid)
        for each in self.spec.stages:
            grid = [cells // step for cells, step in zip(grid, each.stride, strict=True)]
            yield grid, each

    def _node(self, name, inputs, outputs, attributes):
        op = OPS.get(name)
        register_schema(op)
        self.nodes.append(helper.make_node(op.onnx_name, inputs, outputs, domain=DOMAIN, **attributes))
        self.outputs += outputs

    def _graph(self):
        points = helper.make_tensor_value_info("points", onnx.TensorProto.FLOAT, [self.points, 5])
        inputs = [points, helper.make_tensor_value_info("num_points", INT32, [1])]
        outputs = [helper.make_tensor_value_info(name, INT32, None) for name in self.outputs]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        graph = helper.make_graph(self.nodes, "chain", inputs, outputs)
        return link(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION))

    def run(self, cloud):
        """Return the outputs by name; rows beyond the cloud are filled with a point that is inside the range."""
        points = np.full((self.points, 5), 0.5, np.float32)
        points[: len(cloud)] = cloud
        feeds = {"points": points, "num_points": np.array([len(cloud)], np.int32)}
        return {
            name: torch.from_numpy(value).long()
            for name, value in zip(self.outputs, self.session.run(None, feeds), strict=True)
        }

    def check(self, cloud):
        """Compare every output with the dynamic functions; return the number of voxels."""
        found, spec = self.run(cloud), self.spec
        voxel, coords = voxels_of(torch.from_numpy(cloud), spec.low, spec.size, spec.grid, spec.axes)
        assert torch.equal(found["voxel"][: len(cloud)], voxel.where(voxel >= 0, self.voxels))
        assert (found["voxel"][len(cloud) :] == self.voxels).all()
        total = len(coords)
        for stage, (grid, each) in enumerate(self.stages()):
            if stage:
                before = [cells * part for cells, part in zip(grid, each.stride, strict=True)]
                table, coords = pool(coords, before, each.stride)
                padding = (0, 0, 0, self.voxels + 1 - len(table))
                table = torch.nn.functional.pad(table.where(table >= 0, self.voxels), padding, value=self.voxels)
                assert torch.equal(found[f"table{stage}"], table)
            assert found[f"num{stage}"].tolist() == [len(coords)]
            assert torch.equal(found[f"coords{stage}"], padded(coords, self.voxels + 1).long())
            for i in range(2):
                names = [f"{name}{stage}{i}" for name in ("inds", "slot", "position", "sets")]
                want = partition(coords, grid, each.windows[i], each.shifts[i], spec.set_size)
                check_sets([found[name] for name in names], want)
        return total


@pytest.fixture(scope="module")
def chains():
    """Build each graph once: it serves every cloud."""
    made = {}

    def get(name, points=65536, voxels=32768, sets=2048):
        key = (name, points, voxels, sets)
        made[key] = made.get(key) or Chain(SPECS[name], points, voxels, sets)
        return made[key]

    return get


@pytest.mark.parametrize("count", [1, 100, 20_000, 60_000])
def test_clouds_of_every_size_in_one_graph(chains, count):
    cloud = seeded_cloud(count, count, SPECS["waymo_pillar"])
    assert chains("waymo_pillar").check(cloud) >= min(count, 50)


@pytest.mark.parametrize("name", ["waymo_voxel", "nuscenes_pillar"])
@pytest.mark.parametrize("count", [1, 4000])
def test_other_configurations(chains, name, count):
    assert chains(name, 4096, 4096, 600).check(seeded_cloud(count, count, SPECS[name])) >= min(count, 500)


@pytest.mark.parametrize("name", list(SPECS))
def test_empty_cloud_and_cloud_out_of_range(chains, name):
    chain = chains(name, 4096, 4096, 600)
    assert chain.check(np.zeros((0, 5), np.float32)) == 0
    assert chain.check(np.full((7, 5), 200.0, np.float32)) == 0


@pytest.mark.parametrize("name", list(SPECS))
def test_points_out_of_range_or_not_finite_belong_to_no_voxel(chains, name):
    chain, spec = chains(name, 4096, 4096, 600), SPECS[name]
    cloud = seeded_cloud(3, 400, spec)
    clean = chain.check(cloud)
    bad = np.zeros((8, 5), np.float32)
    for row, (axis, value) in enumerate((axis, value) for axis in (0, 1) for value in (np.nan, np.inf, -np.inf, 80.0)):
        bad[row, axis] = value
    tall = np.array([[0, 0, np.nan], [0, 0, np.inf], [0, 0, -np.inf]], np.float32)
    both = np.concatenate([bad, np.pad(tall, ((0, 0), (0, 2))), cloud])
    assert chain.check(both) == clean
    assert (chain.run(both)["voxel"][:11] == chain.voxels).all()
    high = np.array([[1.0, 1.0, 30.0, 0, 0]], np.float32)  # counts where the height is not tested
    assert chain.check(high) == (1 if spec.axes == 2 else 0)


def test_rows_beyond_the_count_are_ignored(chains):
    chain = chains("waymo_pillar", 4096, 4096, 600)
    cloud = seeded_cloud(4, 300, chain.spec)
    points = np.full((4096, 5), np.nan, np.float32)
    points[:300] = cloud
    feeds = {"points": points, "num_points": np.array([300], np.int32)}
    for name, value in zip(chain.outputs, chain.session.run(None, feeds), strict=True):
        assert np.array_equal(value, chain.run(cloud)[name].numpy()), name


def test_overflow_of_voxels_keeps_the_first_and_counts_all(chains):
    chain = chains("waymo_voxel", 4096, 500, 600)
    cloud, spec = seeded_cloud(5, 4000, chain.spec), chain.spec
    found = chain.run(cloud)
    voxel, coords = voxels_of(torch.from_numpy(cloud), spec.low, spec.size, spec.grid)
    assert found["num0"].tolist() == [len(coords)]
    assert len(coords) > 500
    assert torch.equal(found["coords0"], padded(coords[:500], 501).long())
    assert torch.equal(found["voxel"][:4000], voxel.where((voxel >= 0) & (voxel < 500), 500))
    window, shift = spec.stages[0].windows[1], spec.stages[0].shifts[1]
    kept = partition(coords[:500], spec.grid, window, shift, spec.set_size)
    check_sets([found[name] for name in ("inds01", "slot01", "position01", "sets01")], kept)
    table, pooled = pool(coords[:500], spec.grid, (1, 1, 4))
    assert found["num1"].tolist() == [len(pooled)]
    assert torch.equal(found["table1"][: len(table)], table.where(table >= 0, 500))


def test_overflow_of_sets_keeps_the_first_and_counts_all(chains):
    chain = chains("waymo_pillar", 4096, 4096, 50)
    cloud, spec = seeded_cloud(6, 4000, chain.spec), chain.spec
    found = chain.run(cloud)
    _, coords = voxels_of(torch.from_numpy(cloud), spec.low, spec.size, spec.grid)
    inds, slot, position, _ = partition(coords, spec.grid, (12, 12, 1), (0, 0, 0), 36)
    assert found["sets00"].tolist() == [inds.shape[1]]
    assert inds.shape[1] > 50
    assert torch.equal(found["inds00"], inds[:, :50])
    lost = slot >= 50 * 36
    assert lost.any()
    assert torch.equal(found["slot00"][:, : len(coords)], slot.where(~lost, 0))
    assert torch.equal(found["position00"][: len(coords)], position)


def test_overflow_of_pooled_voxels():
    coords = torch.cat(torch.where(torch.ones(1, 8, 3, 4, dtype=torch.bool))).reshape(4, -1).t()
    order = np.lexsort(coords.numpy()[:, [1, 2, 3]].T)
    coords = coords[torch.from_numpy(order)]
    rows = padded(coords, 97)
    rows[96] = 1_000_003  # ignored, whatever it is
    inputs = [rows, torch.tensor([96], dtype=torch.int32)]
    table, pooled = pool(coords, [4, 3, 8], [1, 1, 4])
    attributes = dict(grid=[4, 3, 8], stride=[1, 1, 4], slots=4, max_voxels=10)
    for found in (OPS.get("voxel_pool")(*inputs, **attributes), run_op("voxel_pool", inputs, attributes)):
        slots, rows, count = (torch.as_tensor(each).long() for each in found)
        assert count.tolist() == [24]
        assert torch.equal(slots[:10], table[:10])
        assert (slots[10] == 96).all()
        assert torch.equal(rows, padded(pooled[:10], 11).long())


def test_bev_ignores_whatever_spare_rows_hold():
    x = torch.full((6, 3), float("nan"))
    x[:2] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    coords = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 2], *[[9, 9, 9, 9]] * 4], dtype=torch.int32)
    inputs = [x, coords, torch.tensor([2], dtype=torch.int32)]
    want = torch.zeros(1, 3, 2, 4)
    want[0, :, 1, 0], want[0, :, 0, 2] = x[0], x[1]
    attributes = dict(height=2, width=4)
    assert torch.equal(OPS.get("bev_scatter")(*inputs, **attributes), want)
    assert torch.equal(torch.from_numpy(run_op("bev_scatter", inputs, attributes)[0]), want)


@pytest.mark.parametrize("name", ["voxelize", "set_partition", "voxel_pool", "bev_scatter"])
def test_bodies_hold_only_what_tensorrt_takes(name):
    op = OPS.get(name)
    for case in op.cases:
        dims, attributes = op.split_case(case)
        model = onnx.load_from_string(link(one_node_model(op, dims, attributes, torch.float32)))
        for node in (node for function in model.functions for node in function.node):
            assert node.op_type not in BANNED, node.op_type
            if node.op_type == "ScatterElements":
                assert "reduction" not in {attribute.name for attribute in node.attribute}


def test_what_a_body_cannot_do_is_refused():
    coords, count = torch.zeros(5, 4, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    layers = dict(grid=[8, 8, 8], window=[4, 4, 4], shift=[0, 0, 0], set_size=4, max_sets=8)
    with pytest.raises(UnsupportedError, match=r"EA0402.*one window along z"):
        run_op("set_partition", [coords, count], layers)
    with pytest.raises(UsageError, match=r"EA0110.*slots is 3"):
        OPS.get("voxel_pool")(coords, count, grid=[8, 8, 8], stride=[1, 1, 4], slots=3, max_voxels=4)
    huge = dict(voxelize_attributes(SPECS["waymo_voxel"], 16), grid=[4096, 4096, 2])
    with pytest.raises(UsageError, match=r"EA0110.*cells"):
        run_op("voxelize", [torch.zeros(4, 5), count], huge)
