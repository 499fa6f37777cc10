"""DSVT's point encoder and transformer blocks: golden operator files, deploy forms, and the blocks as a graph."""

import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeattn.export import compile_module
from edgeattn.export.lower import link_bodies
from edgeattn.export.parity import run_bytes
from edgeattn.kernels import segment_max, segment_mean
from edgeattn.kernels._voxels import partition, voxels_of
from edgeattn.model import Capacity
from edgeattn.models._dsvt_blocks import Backbone3d, PointEncoder, pillar_stages, voxel_stages
from edgeattn.models._dsvt_encoder import Block, EncoderLayer, PositionEmbedding, first_slots, window_offsets
from edgeattn.models._dsvt_pool import StageReduction
from edgeattn.models._layers import fold
from edgeattn.tensors import Dim
from edgeattn.testing import expected_outputs, one_node_model
from edgeattn.weights import seed_weights

FILES = Path(__file__).parent / "golden" / "ops"
# Largest difference over largest value, as in golden/README.md.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
each_form = pytest.mark.parametrize("deployed", [False, True], ids=["original", "deploy"])
SMALL = {
    "pillar": pillar_stages(side=40, window=12, grown=24, set_size=36),
    "wide": pillar_stages(side=40, window=30, grown=30, set_size=90),
    "voxel": voxel_stages(side=26, heights=(16, 4, 2, 1), window=12, set_size=48),
}


def cases(name):
    return json.loads((FILES / f"{name}.json").read_text())["cases"]


def arrays(name, case, dtype=torch.float64):
    """Return the tensors of one golden case by name; numbers in `dtype`."""
    stored = np.load(FILES / f"{name}.npz")
    found = {key.split(".")[1]: torch.from_numpy(stored[key]) for key in stored.files if key.startswith(f"{case}.")}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def prepared(module, entry, dtype, deployed):
    """Return `module` with the weights of its golden keys, which must be `entry`'s."""
    found = [[key, list(value.shape)] for key, value in module.state_dict().items()]
    assert sorted(found) == sorted(entry["state_dict"])
    return seeded(module, dtype, deployed)


def seeded(module, dtype=torch.float64, deployed=False):
    seed_weights(module)
    module = module.eval().to(dtype)
    return fold(module) if deployed else module


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", ["layer_a", "layer_b"])
@each_form
@each_dtype
def test_layer_agrees_with_golden(case, deployed, dtype):
    entry, given = cases("dsvt_set_attention")[case], arrays("dsvt_set_attention", case, dtype)
    sizes = entry["d_model"], entry["nhead"], entry["dim_feedforward"]
    module = prepared(EncoderLayer(*sizes), entry, dtype, deployed)
    slot = first_slots(given["inds"].expand(2, -1, -1), given["mask"].expand(2, -1, -1), len(given["src"]))[0]
    inputs = given["src"], given["pos"], given["inds"], slot
    with torch.no_grad():
        assert error(module(*inputs), given["y"]) < LIMITS[dtype]
        if not deployed:
            assert error(module.win_attn(*inputs), given["attn"]) < LIMITS[dtype]


@pytest.mark.parametrize("case", ["block_even", "block_odd"])
@each_form
@each_dtype
def test_block_agrees_with_golden(case, deployed, dtype):
    """Sets come from shift `block_id % 2`, position embeddings from the number of the layer."""
    entry, given = cases("dsvt_set_attention")[case], arrays("dsvt_set_attention", case, dtype)
    module = prepared(Block(entry["d_model"], entry["nhead"], entry["dim_feedforward"]), entry, dtype, deployed)
    shift = entry["block_id"] % 2
    inds = given[f"inds{shift}"]
    slot = first_slots(inds, given[f"mask{shift}"], len(given["src"]))
    with torch.no_grad():
        found = module(given["src"], (given["pos0"], given["pos1"]), inds, slot)
    assert error(found, given["y"]) < LIMITS[dtype]


@each_form
@each_dtype
def test_reduction_agrees_with_golden(deployed, dtype):
    entry, given = cases("dsvt_set_attention")["reduce"], arrays("dsvt_set_attention", "reduce", dtype)
    x = given["pool_x"].transpose(1, 2)  # [m, slots, c]
    module = prepared(StageReduction(x.shape[2], entry["heads"], entry["slots"]), entry, dtype, deployed)
    # The same through a table: one row per filled slot, in a shuffled order, and the spare row not zero.
    filled = (x != 0).any(2)
    order = torch.randperm(int(filled.sum()))
    features = torch.cat([x[filled][order], torch.ones_like(x[:1, 0])])
    table = torch.full(filled.shape, len(order), dtype=torch.int32)
    table[filled] = order.argsort().int()
    with torch.no_grad():
        assert error(module(features, table), given["pool_y"]) < LIMITS[dtype]
        if not deployed:
            assert error(module.pool(x), given["pool_y"]) < LIMITS[dtype]


@pytest.mark.parametrize(("case", "window"), [("pos2", (12, 12, 1)), ("pos3", (12, 12, 8))])
@each_dtype
def test_position_embedding_agrees_with_golden(case, window, dtype):
    entry, given = cases("dsvt_set_attention")[case], arrays("dsvt_set_attention", case, dtype)
    module = prepared(PositionEmbedding(window, given["y"].shape[1]), entry, dtype, deployed=False)
    places = torch.arange(math.prod(window), dtype=torch.int32)
    with torch.no_grad():
        assert error(module.position_embedding_head(given["offsets"]), given["y"]) < LIMITS[dtype]
        assert error(fold(module)(places), module(places).double()) < LIMITS[dtype]


def test_offsets_are_relative_to_the_middle_of_the_window():
    offsets = window_offsets(torch.tensor([0, 5 + 4 * 6 + 2 * 24]), (6, 4, 5))
    assert offsets.tolist() == [[-3.0, -2.0, -2.5], [2.0, -2.0, 0.5]]


@pytest.mark.parametrize("case", list(cases("dsvt_vfe")))
@each_form
@each_dtype
def test_point_encoder_agrees_with_golden(case, deployed, dtype):
    entry, given = cases("dsvt_vfe")[case], arrays("dsvt_vfe", case, dtype)
    low, high = entry["range"][:3], entry["range"][3:]
    module = prepared(PointEncoder(low, entry["cell"], given["features"].shape[1]), entry, dtype, deployed)
    grid = [round((end - start) / size) for start, end, size in zip(low, high, entry["cell"], strict=True)]
    axes = 3 if entry["module"].endswith("3d") else 2
    batch, points = given["points"][:, 0].int(), given["points"][:, 1:]
    voxel, coords = voxels_of(points, low, entry["cell"], grid, axes, batch)
    assert torch.equal(coords, given["coords"].long())
    voxel, coords = torch.where(voxel < 0, len(coords), voxel), torch.cat([coords, torch.zeros_like(coords[:1])])
    with torch.no_grad():
        found = module(points, voxel.int(), coords.int())
    assert error(found[:-1], given["features"]) < LIMITS[dtype]


def cloud(stages, voxels, batch=1):
    """Return random voxels of a grid, sorted, with a spare row: features and coords."""
    nx, ny, nz = stages[0].grid
    keys = torch.randperm(batch * nx * ny * nz)[:voxels].sort().values
    columns = (keys // (nx * ny * nz), keys % nz, keys // nz % ny, keys // (nz * ny) % nx)
    coords = torch.stack([*columns], 1).int()
    return torch.randn(voxels + 1, 32, dtype=torch.float64), torch.cat([coords, torch.zeros_like(coords[:1])])


def padded(tensor, rows):
    """Make room for `rows` voxels, the spare row last; unused rows hold zeros."""
    out = tensor.new_zeros(rows + 1, *tensor.shape[1:])
    out[: len(tensor) - 1] = tensor[:-1]
    out[-1] = tensor[-1]
    return out


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("voxels", [300, 1])
def test_fixed_capacity_equals_the_original(kind, voxels):
    stages = SMALL[kind]
    backbone = seeded(Backbone3d(stages, 32, 8, 64))
    features, coords = cloud(stages, voxels)
    count = torch.tensor([voxels], dtype=torch.int32)
    room = 400 + 13 * torch.arange(len(stages))
    backbone.capacity = Capacity(1, tuple(room.tolist()), tuple((70 + i, 60 + i) for i in range(len(stages))))
    with torch.no_grad():
        wanted = backbone(features, coords, count)
        found = backbone.deploy()(padded(features, 400), padded(coords, 400), count)
    last = int(wanted[2])
    assert len(wanted[0]) == last + 1
    assert len(found[0]) == int(room[-1]) + 1
    assert torch.equal(found[2], wanted[2])
    assert torch.equal(found[3], wanted[3])
    assert torch.equal(found[1][:last], wanted[1][:last].int())
    assert error(found[0][:last], wanted[0][:last]) < 1e-13


def test_encoder_and_stages_are_one_graph():
    """The deploy forms in ONNX Runtime, at fixed capacities, for two clouds; the table of merged voxels included."""
    stages = SMALL["voxel"]
    encoder = seeded(PointEncoder((-4.16, -4.16, -2.0), (0.32, 0.32, 0.375), 32), torch.float32)
    backbone = seeded(Backbone3d(stages, 32, 8, 64), torch.float32)
    backbone.capacity = Capacity(500, (400,) * 4, ((70, 60),) * 4)
    module = Chained(fold(encoder), backbone.deploy()).eval()
    given = [placed(stages, points) for points in (500, 3)]
    names = ("points", "voxel", "coords", "num_voxels")
    graph = compile_module(module, dict(zip(names, given[0], strict=True)))
    data = ir.serde.serialize_model(graph).SerializeToString()
    for inputs in given:
        found = run_bytes(data, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        with torch.no_grad():
            wanted = module(*inputs)
        last = int(wanted[2])
        assert error(torch.from_numpy(found[0])[:last], wanted[0][:last].double()) < 1e-5
        for value, want in zip(found[1:], wanted[1:], strict=True):
            assert torch.equal(torch.from_numpy(value), want.int())


class Chained(torch.nn.Module):
    def __init__(self, encoder, backbone):
        super().__init__()
        self.encoder, self.backbone = encoder, backbone

    def forward(self, points, voxel, coords, num_voxels):
        return self.backbone(self.encoder(points, voxel, coords), coords, num_voxels)


def placed(stages, count):
    """Return `count` of 500 points with their voxels, 400 rows of coords and the number of voxels."""
    high = torch.tensor([8.32, 8.32, 6.0, 1.0, 1.0])
    points = torch.rand(500, 5) * high + torch.tensor([-4.16, -4.16, -2.0, 0.0, 0.0])
    points[count:] = 0
    voxel, coords = voxels_of(points[:count], (-4.16, -4.16, -2.0), (0.32, 0.32, 0.375), stages[0].grid)
    keep = min(len(coords), 400)
    index = torch.full((500,), 400, dtype=torch.int32)
    index[:count] = torch.where(voxel < keep, voxel, 400).int()
    rows = torch.zeros(401, 4, dtype=torch.int32)
    rows[:keep] = coords[:keep].int()
    return points, index, rows, torch.tensor([keep], dtype=torch.int32)


def test_the_original_takes_a_batch():
    stages = SMALL["voxel"]
    backbone = seeded(Backbone3d(stages, 32, 8, 64))
    features, coords = cloud(stages, 400, batch=2)
    with torch.no_grad():
        both, places, _, _ = backbone(features, coords, torch.tensor([400], dtype=torch.int32))
        for item in range(2):
            own = torch.cat([coords[:-1, 0] == item, torch.tensor([True])])
            alone = coords[own] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
            count = torch.tensor([int(own.sum()) - 1], dtype=torch.int32)
            found, _, _, _ = backbone(features[own], alone, count)
            assert error(found[:-1], both[:-1][places[:-1, 0] == item]) < 1e-13


def test_an_empty_cloud_passes():
    backbone = seeded(Backbone3d(SMALL["voxel"], 32, 8, 64))
    coords = torch.zeros(1, 4, dtype=torch.int32)
    features, _, count, counts = backbone(torch.randn(1, 32).double(), coords, torch.zeros(1, dtype=torch.int32))
    assert features.shape == (1, 32)
    assert features.isfinite().all()
    assert not count.any()
    assert not counts.any()


def test_deploying_needs_a_capacity():
    with pytest.raises(ValueError, match="capacity"):
        Backbone3d(SMALL["pillar"], 32).deploy()


def test_layers_embed_the_place_in_the_windows_of_their_own_number():
    """The published quirk: a block on shifted windows embeds positions of shift 0 in its first layer."""
    backbone = seeded(Backbone3d(SMALL["pillar"], 32, 8, 64))
    features, coords = cloud(SMALL["pillar"], 300)
    with torch.no_grad():
        wanted = backbone(features, coords, torch.tensor([300], dtype=torch.int32))[0]
        only = backbone.blocks_only()(*authors_inputs(backbone, features, coords).values())
        assert error(only, wanted[:-1]) < 1e-13
        inputs = authors_inputs(backbone, features, coords)
        inputs["pos_embed_tensor"] = inputs["pos_embed_tensor"].flip(1)
        assert error(backbone.blocks_only()(*inputs.values()), wanted[:-1]) > 1e-3


def authors_inputs(backbone, features, coords):
    """Return the inputs of the authors' deployed part, computed as they do."""
    stage = backbone.stages[0]
    inds, masks, places = [], [], []
    for shift in range(2):
        entries, _, place, _ = partition(
            coords[:-1], stage.grid, stage.windows[shift], stage.shifts[shift], stage.set_size
        )
        repeated = torch.zeros_like(entries, dtype=torch.bool)
        repeated[..., 1:] = entries[..., 1:] == entries[..., :-1]
        inds.append(entries.int())
        masks.append(repeated)
        places.append(place)
    embedded = [
        torch.stack([layer(place) for layer, place in zip(layers, places, strict=True)])
        for layers in backbone.input_layer.posembed_layers[0]
    ]
    names = ["set_voxel_inds_tensor_shift_0", "set_voxel_inds_tensor_shift_1"]
    names += ["set_voxel_masks_tensor_shift_0", "set_voxel_masks_tensor_shift_1"]
    given = dict(zip(names, [*inds, *masks], strict=True))
    return {"src": features[:-1], **given, "pos_embed_tensor": torch.stack(embedded).detach()}


def test_blocks_alone_are_one_graph_for_every_size():
    backbone = seeded(Backbone3d(SMALL["pillar"], 32, 8, 64), torch.float32)
    blocks = backbone.blocks_only()
    n, first, second = (Dim(name, 1, None, size) for name, size in (("n", 4000), ("sets0", 400), ("sets1", 300)))
    shapes = [[n, 32], [2, first, 36], [2, second, 36], [2, first, 36], [2, second, 36], [4, 2, n, 32]]
    given = authors_inputs(backbone, *cloud_float32(300))
    graph = compile_module(
        blocks, given, outputs=["output"], shapes=dict(zip(given, [tuple(each) for each in shapes], strict=True))
    )
    assert {str(value.name) for value in graph.graph.inputs} == set(given)
    data = ir.serde.serialize_model(graph).SerializeToString()
    for voxels in (300, 1, 1200):
        given = authors_inputs(backbone, *cloud_float32(voxels))
        (found,) = run_bytes(data, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            wanted = blocks(*given.values())
        assert error(torch.from_numpy(found), wanted.double()) < 1e-5


def cloud_float32(voxels):
    features, coords = cloud(SMALL["pillar"], voxels)
    return features.float(), coords


def test_blocks_of_several_stages_are_refused():
    with pytest.raises(ValueError, match="4 stages"):
        Backbone3d(SMALL["voxel"], 32).blocks_only()


@pytest.mark.parametrize("op", [segment_max.op, segment_mean.op], ids=lambda op: op.name)
def test_segment_bodies_lose_no_update_with_two_threads(op):
    """ONNX Runtime's ScatterND with reduction does, now and then, where rows of one segment meet."""
    dims, attributes = {"p": 65_536, "c": 48}, {"segments": 40}
    assert "ScatterND" not in op.body(dims, attributes, "float")
    linked = ir.serde.serialize_model(
        link_bodies(ir.serde.deserialize_model(one_node_model(op, dims, attributes, torch.float32)))
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(linked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    _, index = op.example({**dims, **attributes})
    # Every update of a maximum counts where values grow from row to row.
    x = torch.arange(65_536.0).unsqueeze(1) / 65_536 + torch.zeros(48)
    (wanted,) = expected_outputs(op, [x, index], attributes)
    for _ in range(8):
        (found,) = session.run(None, {"x": x.numpy(), "index": index.numpy()})
        assert error(torch.from_numpy(found), wanted) < 1e-5
