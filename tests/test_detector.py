"""A small DSVT in all its forms: the original, the deploy form, the exported graph and the blocks alone."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny import OUTPUTS, registered, run, seeded, tiny_cloud, tiny_model

import edgeattn
from edgeattn.clouds import count_needs
from edgeattn.detection import align, pack
from edgeattn.errors import UsageError
from edgeattn.kernels._voxels import voxels_of
from edgeattn.pipeline import export_model

tiny, tiny_voxel, tiny_crowded = map(registered, ("pillar", "voxel", "crowded"))
KINDS = ("pillar", "voxel", "crowded")
each_kind = pytest.mark.parametrize("kind", KINDS)
RTX = find_spec("tensorrt_rtx") is not None
CLOUDS = {
    "empty": tiny_cloud(0),
    "one": tiny_cloud(1, reach=2.0),
    "hundred": tiny_cloud(100),
    "dense": tiny_cloud(900),
    "near": tiny_cloud(2000, reach=3.0),
    "outside": tiny_cloud(500) + np.float32([100, 0, 0, 0, 0]),
    "above": tiny_cloud(500) + np.float32([0, 0, 50, 0, 0]),
}
each_cloud = pytest.mark.parametrize("cloud", CLOUDS.values(), ids=list(CLOUDS))


def needs(kind, cloud):
    """Return the voxels of every stage, then the sets of every stage and shift that a block uses."""
    found = count_needs(cloud, tiny_model(kind).inputs[0].cloud.space)
    counts = [found[name] for name in sorted(found, key=lambda name: name[0] != "v") if name != "points"]
    stages = len(counts) // 3
    if kind == "voxel":  # one block per stage, which takes the shifts in turn
        counts = counts[:stages] + [each if place in (0, 3) else 0 for place, each in enumerate(counts[stages:])]
    return counts


def check_equal(found, expected, limit):
    np.testing.assert_array_equal(found["counts"], expected["counts"])
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=limit)


@each_kind
@each_cloud
def test_deploy_form_is_exact(kind, cloud):
    module = seeded(kind)
    expected = run(module, cloud)
    check_equal(run(module.deploy().eval(), cloud, rows=2000), expected, 1e-9)
    assert expected["counts"].tolist() == needs(kind, cloud)
    assert (expected["labels"] > 0).any()


@each_kind
def test_deploy_form_with_capacities_just_reached(kind):
    cloud, module = CLOUDS["dense"], seeded(kind)
    expected = run(module, cloud)
    stages = len(module.capacity.voxels)
    voxels, sets = expected["counts"][:stages], expected["counts"][stages:]
    module.limit(len(cloud), voxels.tolist(), [max(1, sets[0::2].max()), max(1, sets[1::2].max())])
    check_equal(run(module.deploy().eval(), cloud), expected, 1e-9)


@each_kind
def test_deploy_form_with_more_room_than_cells(kind):
    cloud, module = tiny_cloud(2500), seeded(kind)
    module.limit(3000, [2500] * len(module.capacity.voxels), [700, 600])
    check_equal(run(module.deploy().eval(), cloud, rows=3000), run(module, cloud), 1e-9)


def edges():
    """Return points on the edges of cells and of the range, and one float32 step to either side."""
    rng, ends = np.random.default_rng(0), np.float32([-100, 100])
    cloud = tiny_cloud(900)
    cloud[:, :2] = np.float32(-6.4) + rng.integers(0, 41, (900, 2)).astype(np.float32) * np.float32(0.32)
    cloud[:300, :2] = np.nextafter(cloud[:300, :2], ends[0])
    cloud[300:600, :2] = np.nextafter(cloud[300:600, :2], ends[1])
    cloud[:, 2] = rng.choice(np.float32([-2, 4, np.nextafter(np.float32(4), ends[0]), 1]), 900)
    return cloud


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_points_on_the_edges_of_cells(kind, dtype):
    module = seeded(kind, dtype)
    expected = run(module, edges())
    np.testing.assert_array_equal(run(module.deploy().eval(), edges())["counts"], expected["counts"])
    assert expected["counts"].min() >= 0
    if dtype == torch.float32:  # the host counts as the graph does
        assert expected["counts"].tolist() == needs(kind, edges())


@each_kind
def test_rows_behind_the_points_may_hold_anything(kind):
    module, cloud = seeded(kind), CLOUDS["hundred"]
    deployed, expected = module.deploy().eval(), run(module, cloud)
    for rubbish in (1e30, float("nan")):
        check_equal(run(deployed, cloud, rows=2000, rubbish=rubbish), expected, 1e-9)


@each_kind
def test_batch_is_one_cloud_at_a_time(kind):
    clouds = [CLOUDS[name] for name in ("dense", "empty", "outside", "hundred")]
    rows = np.full((len(clouds), 900, 5), 1.0)
    for row, cloud in zip(rows, clouds, strict=True):
        row[: len(cloud)] = cloud
    counts = torch.tensor([len(cloud) for cloud in clouds], dtype=torch.int32)
    module = seeded(kind)
    with torch.no_grad():
        found = dict(zip(OUTPUTS, module(torch.from_numpy(rows), counts), strict=True))
    alone = [run(module, cloud) for cloud in clouds]
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_allclose(found[name], np.stack([each[name] for each in alone]), rtol=0, atol=1e-9)
    assert found["counts"].tolist() == sum(each["counts"] for each in alone).tolist()


@pytest.mark.parametrize("voxels", [1, 100, 799])
def test_voxels_beyond_the_capacity_are_as_if_they_were_not_there(voxels):
    """Counts tell the truth; what is lost are the last voxels along x, then y."""
    cloud, module = CLOUDS["dense"], seeded("pillar")
    config = module.config
    voxel, coords = voxels_of(torch.from_numpy(cloud).double(), config.low, config.size, config.stages[0].grid)
    kept = cloud[(voxel >= 0) & (voxel < min(voxels, len(coords) - 1))]
    voxels = min(voxels, len(coords) - 1)
    module.limit(voxels=[voxels])
    found, expected = run(module.deploy().eval(), cloud), run(module, kept)
    assert found["counts"][0] == len(coords)
    assert expected["counts"][0] == voxels
    found["counts"][0] = voxels
    check_equal(found, expected, 1e-9)


@each_kind
def test_sets_beyond_the_capacity_are_counted(kind):
    cloud, module = CLOUDS["dense"], seeded(kind)
    module.limit(sets=[2, 1])
    found = run(module.deploy().eval(), cloud)
    assert found["counts"].tolist() == needs(kind, cloud)
    assert np.isfinite(found["boxes"]).all()
    assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(voxels=[5, 5, 5]), "--max-voxels: once, or once for each of 2 stages; got 3"),
        (dict(sets=[5, 5, 5]), "--max-sets: once, or once for each of 2 shifts; got 3"),
        (dict(voxels=[0]), "1 or more"),
        (dict(sets=[4, -1]), "1 or more"),
        (dict(points=0), "1 or more"),
    ],
)
def test_capacities_that_do_not_fit(options, text):
    module = tiny_model("voxel").build()
    before = module.capacity
    with pytest.raises(UsageError, match=f"EA0115.*{text}"):
        module.limit(**options)
    assert module.capacity == before


def test_later_stages_need_no_more_than_the_first():
    module = tiny_model("voxel").build()
    module.limit(points=300, voxels=[500], sets=[40])
    assert (module.capacity.points, module.capacity.voxels) == (300, (500, 500))
    assert module.capacity.sets == ((40, 40), (40, 40))
    module.limit(voxels=[600, 200], sets=[30, 20])
    assert module.capacity.voxels == (600, 200)
    assert module.capacity.sets == ((30, 20), (30, 20))
    assert module.capacity.points == 300


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return export_model(tiny, output=tmp_path_factory.mktemp("detector") / "fp32")


@pytest.fixture(scope="module")
def boards(tiny, tmp_path_factory):
    return export_model(tiny, output=tmp_path_factory.mktemp("detector") / "fp16", targets=("orin", "thor"))


def measured(bundle):
    return json.loads((bundle.path / "reports" / "export.json").read_text())["measured"]["check"]


def check_accepted(bundle, precision, limit):
    figures = measured(bundle)
    assert figures["matched"] == 1.0
    assert figures["scaled_err"] <= limit
    assert figures["tensorrt_rtx"]["verdict"] == ("pass" if RTX else "skipped")
    assert figures["tensorrt_rtx"]["plugins"] == {"EdgeSegmentMax": 2, "EdgeSegmentMean": 1}
    assert bundle.precision == precision
    bundle.verify()


def check_graph_against(bundle, module, limit):
    """One graph serves every cloud: counts are exact, boxes within `limit` of the original (or of the deploy form)."""
    spec = bundle.inputs[0]
    deployed = module.deploy().eval()
    clouds = {**CLOUDS, "edges": edges(), "too many voxels": tiny_cloud(2000)}
    with edgeattn.load(bundle, backend="ort", threads=1) as session:
        for name, cloud in clouds.items():
            found = session(pack(cloud, spec)[0])
            expected = run(module, cloud) if name != "too many voxels" else run(deployed, cloud, rows=2000)
            np.testing.assert_array_equal(found["counts"], expected["counts"], err_msg=name)
            ours, theirs, share = align(dict(found.items()), expected)
            assert share == 1.0, name
            np.testing.assert_allclose(ours["boxes"], theirs["boxes"], atol=limit, rtol=0, err_msg=name)
            np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=limit, rtol=0, err_msg=name)


def test_exported_graph(bundle):
    check_accepted(bundle, "fp32", 5e-6)
    check_graph_against(bundle, seeded("pillar", torch.float32), 2e-5)


def test_exported_graph_for_boards(boards):
    """Half precision, and operators that the rules of both boards take."""
    check_accepted(boards, "fp16", 2e-3)
    with edgeattn.load(boards, backend="ort", threads=1) as session:
        for name, cloud in CLOUDS.items():
            found = session(pack(cloud, boards.inputs[0])[0])
            assert found["counts"].tolist() == needs("pillar", cloud), name
            assert np.isfinite(found["boxes"]).all(), name
    graph = onnx.load(boards.file("model.onnx"), load_external_data=False).graph
    first = next(node for node in graph.node if node.op_type.startswith("EdgeVoxelize"))
    assert list(first.input) == ["points", "num_points"], "coordinates may not be rounded"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_exported_graph_of_the_other_kinds(kind, precision, request, tmp_path):
    name = request.getfixturevalue(f"tiny_{kind}")
    made = export_model(name, output=tmp_path / "out", precision=precision, targets=("orin", "thor"))
    check_accepted(made, precision, 5e-6 if precision == "fp32" else 3e-3)
    check_operators(made)
    if precision == "fp32":
        check_graph_against(made, seeded(kind, torch.float32), 1e-4)


def flat_nodes(model):
    """Return (function name, or "" for the graph, and node) for every node, those in bodies and subgraphs too."""
    stack = [("", model.graph.node), *((function.name, function.node) for function in model.functions)]
    while stack:
        where, nodes = stack.pop()
        for node in nodes:
            yield where, node
            stack += [(where, each.g.node) for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]


def check_operators(bundle):
    """Nothing whose result has a size that depends on the data, no sorting, no large TopK, no scattered sums."""
    model = onnx.load(bundle.file("model.onnx"))
    forbidden = {"Unique", "NonZero", "Compress", "Loop", "Scan", "If", "CumSum", "NonMaxSuppression", "Sort"}
    numbers = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer if not value.external_data}
    for where, node in flat_nodes(model):
        assert node.op_type not in forbidden, (where, node.op_type)
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type in ("ScatterND", "ScatterElements") and attributes.get("reduction", b"none") != b"none":
            assert where.startswith("EdgeSegment"), (where, node.op_type)
        if node.op_type == "TopK":
            assert where == ""
            assert int(numbers[node.input[1]].item()) <= 3840
    sizes = [value.type.tensor_type.shape.dim for value in model.graph.value_info]
    assert all(dim.HasField("dim_value") for shape in sizes for dim in shape)
    assert model.functions


@pytest.mark.parametrize("which", ["bundle", "boards"])
def test_operators(which, request):
    check_operators(request.getfixturevalue(which))


@pytest.mark.slow
def test_second_export_is_byte_identical(bundle, tmp_path):
    """Another process, hash seed and folder."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from tiny import tiny_model\n"
        "from edgeattn.model import MODELS, register\n"
        "from edgeattn.pipeline import export_model\n"
        "MODELS.names(); register(tiny_model())\n"
        "export_model('dsvt_tiny', output='again', check=False)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name in ("model.onnx", "precision.json", "reference/weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == bundle.file(name).read_bytes(), name
