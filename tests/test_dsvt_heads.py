"""Bird's-eye backbone and heads of DSVT: keys, golden decoding, proposals, deploy forms, and the heads as graphs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.boxes import Detections, match, suppress_center
from edgeattn.engine import rtx_check
from edgeattn.export import compile_module
from edgeattn.export.precision import to_float16
from edgeattn.models._bev import Backbone2d, CenterDecode, CenterHead, best_cells, largest
from edgeattn.models._layers import fold, fold_children
from edgeattn.models._proposals import Proposals, neighbours, positions
from edgeattn.models._transfusion import TransFusionHead
from edgeattn.weights import seed_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "ops" / "center_decode.json").read_text())["cases"]
# (relative, absolute) error against numbers that were rounded to float32.
LIMITS = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-6, 1e-6)}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
each_case = pytest.mark.parametrize("case", list(CASES))
MAPS = ("center", "center_z", "dim", "rot", "iou", "hm")


class Whole(nn.Module):
    """From a bird's-eye map to boxes, under the names of the detector."""

    def __init__(self, backbone_2d, dense_head):
        super().__init__()
        self.backbone_2d, self.dense_head = backbone_2d, dense_head

    def forward(self, bev):
        return self.dense_head.decode(self.dense_head(self.backbone_2d(bev)))

    def deploy(self, align=1):
        return fold_children(self, align)


def small_transfusion(inputs=24, **options):
    sizes = dict(size=(20, 16), low=(-6.0, -4.8), width=32, heads=4, hidden=48, proposals=24, radius=3)
    return TransFusionHead(inputs, **{**sizes, **options})


WHOLES = {
    "center": (lambda: Whole(Backbone2d(24), CenterHead(low=(-5.12, -3.84), top=50)), (24, 32)),
    "transfusion": (lambda: Whole(Backbone2d(24, (0.5, 1, 2)), small_transfusion(384)), (32, 40)),
}
each_whole = pytest.mark.parametrize("name", list(WHOLES))


def seeded(module, dtype=torch.float64):
    seed_weights(module)
    return module.eval().to(dtype)


def whole(name, dtype=torch.float64):
    """Return a seeded small network and a map for it."""
    build, size = WHOLES[name]
    return seeded(build(), dtype), torch.randn(1, 24, *size, dtype=dtype)


def parameters(module):
    return sum(tensor.numel() for tensor in module.parameters())


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def golden(case):
    stored = np.load(GOLDEN / "ops" / "center_decode.npz")
    return {key.split(".")[1]: stored[key] for key in stored.files if key.startswith(f"{case}.")}


def decoded(case, dtype):
    """Return boxes, scores and labels of a golden case."""
    entry, given = CASES[case], golden(case)
    decode = CenterDecode(
        low=entry["range"][:2], cell=[size * entry["stride"] for size in entry["cell"][:2]], top=entry["top_k"],
        threshold=entry["score_thresh"], limits=entry["center_limit"], rectifier=entry["iou_rectifier"],
    )  # fmt: skip
    return [tensor[0] for tensor in decode({name: torch.from_numpy(given[name]).to(dtype) for name in MAPS})]


def test_keys_are_the_authors():
    stored = json.loads((GOLDEN / "dsvt_waymo_pillar.json").read_text())["state_dict"]
    for prefix, module in (("backbone_2d.", Backbone2d(192)), ("dense_head.", CenterHead())):
        expected = [entry for entry in stored if entry[0].startswith(prefix)]
        found = [
            [prefix + key, list(value.shape), str(value.dtype).removeprefix("torch.")]
            for key, value in module.state_dict().items()
        ]
        assert found == expected


def test_parameters_of_nuscenes():
    """The published total less point encoder and transformer, counted from their widths."""
    width, hidden = 128, 256
    encoder = 11 * 64 + 2 * 64 + 128 * 128 + 2 * 128
    layer = 4 * width * (width + 1) + width * hidden + hidden + hidden * width + width + 3 * 2 * width
    embedding = 3 * width + 2 * width + width * (width + 1)
    blocks = 4 * (2 * (layer + embedding) + 2 * width)
    assert encoder + blocks + parameters(Backbone2d(128, (0.5, 1, 2))) + parameters(TransFusionHead()) == 7_118_559


def test_transfusion_keys():
    keys = list(TransFusionHead().state_dict())
    assert keys[:4] == [
        "shared_conv.weight",
        "shared_conv.bias",
        "heatmap_head.0.conv.weight",
        "heatmap_head.0.conv.bias",
    ]
    for key in (
        "heatmap_head.0.bn.running_var", "heatmap_head.1.bias", "class_encoding.weight",
        "decoder.self_attn.in_proj_weight", "decoder.multihead_attn.out_proj.bias", "decoder.linear2.weight",
        "decoder.norm3.weight", "decoder.self_posembed.position_embedding_head.1.running_mean",
        "decoder.cross_posembed.position_embedding_head.3.weight", "prediction_head.vel.0.1.weight",
        "prediction_head.heatmap.1.bias",
    ):  # fmt: skip
        assert key in keys
    towers = [key.split(".")[1] for key in keys if key.startswith("prediction_head.") and key.endswith(".1.bias")]
    names = ["center", "height", "dim", "rot", "vel", "iou", "heatmap"]
    assert list(dict.fromkeys(towers)) == names


@each_case
@each_dtype
def test_center_decoding_agrees_with_golden(case, dtype):
    given = golden(case)
    boxes, scores, labels = decoded(case, dtype)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (dtype, dtype, torch.int32)
    kept = labels > 0
    rtol, atol = LIMITS[dtype]
    np.testing.assert_array_equal(labels[kept] - 1, given["labels"])
    np.testing.assert_allclose(scores[kept], given["rectified"], rtol, atol)
    np.testing.assert_allclose(boxes[kept], given["boxes"], rtol, atol)


@each_case
@each_dtype
def test_detections_agree_with_golden(case, dtype):
    """Decoding and suppression in a row: the same boxes survive, in the same order."""
    entry, given = CASES[case], golden(case)
    boxes, scores, labels = (tensor.numpy() for tensor in decoded(case, dtype))
    found = Detections(boxes.astype(np.float32), scores.astype(np.float32), labels)
    kept = suppress_center(found, entry["nms_thresh"], before=entry["nms_pre"], after=entry["nms_post"])
    np.testing.assert_array_equal(kept.labels, given["final_labels"])
    np.testing.assert_allclose(kept.boxes, given["final_boxes"], *LIMITS[dtype])
    np.testing.assert_allclose(kept.scores, given["final_scores"], *LIMITS[dtype])


def test_center_decoding_drops_weak_and_far_boxes():
    maps = {name: torch.zeros(2, count, 4, 5) for name, count in zip(MAPS, (2, 1, 3, 2, 1, 3), strict=True)}
    maps["hm"] -= 5
    for row, column, label in ((1, 2, 0), (2, 3, 1), (3, 4, 2), (0, 0, 1)):
        maps["hm"][1, label, row, column] = 3.0 - row
    maps["center_z"][1, 0, 2, 3] = 11.0
    maps["rot"][1, 1] = -1.0
    maps["iou"][1] = 1.0
    boxes, scores, labels = CenterDecode(low=(0.0, -1.0), cell=(0.5, 0.5), top=6)(maps)
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 6, 7), (2, 6), (2, 6))
    assert labels.tolist() == [[0] * 6, [2, 1, 0, 3, 0, 0]]
    assert not boxes[labels == 0].any()
    assert not scores[labels == 0].any()
    torch.testing.assert_close(boxes[1, 1], torch.tensor([1.0, -0.5, 0, 1, 1, 1, -np.pi / 2]))
    torch.testing.assert_close(scores[1, 1], torch.tensor(2.0).sigmoid() ** (1 - 0.68))


def test_best_cells_are_the_best_of_all():
    heat = torch.randn(2, 3, 9, 7)
    logit, label, cell = best_cells(heat, 20)
    expected, place = heat.flatten(1).topk(20)
    torch.testing.assert_close(logit, expected)
    torch.testing.assert_close((label * 63 + cell).long(), place)


def test_equal_values_are_taken_from_the_front():
    """As ONNX Runtime takes them: of a plateau the first places, in order, behind and before other values."""
    values = torch.zeros(2, 1000)
    values[0, [700, 900, 30]] = torch.tensor([2.0, 3.0, 2.0])
    values[1, [5, 6]] = -1.0
    top, place = largest(values, 8)
    assert place.tolist() == [[900, 30, 700, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 7, 8, 9]]
    assert top.tolist() == [[3, 2, 2, 0, 0, 0, 0, 0], [0] * 8]
    ranked = torch.randn(3, 4, 500).round(decimals=1)
    top, place = largest(ranked, 60)
    expected, order = ranked.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top, expected[..., :60])
    assert torch.equal(place, order[..., :60])
    values[0, 10] = float("nan")
    assert largest(values, 8)[0].isnan().sum() == 1


@pytest.mark.parametrize("upsample", [(1, 2, 4), (0.5, 1, 2)], ids=str)
@each_dtype
def test_backbone_shapes_and_deploy_form(upsample, dtype):
    backbone = seeded(Backbone2d(24, upsample), dtype)
    bev = torch.randn(2, 24, 24, 40, dtype=dtype)
    with torch.no_grad():
        expected, found = backbone(bev), fold(backbone)(bev)
    assert expected.shape == (2, 384, int(24 * upsample[0]), int(40 * upsample[0]))
    assert relative(found, expected) < {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    assert not [module for module in fold(backbone).modules() if isinstance(module, nn.BatchNorm2d)]


@each_dtype
def test_center_head_shapes_and_deploy_form(dtype):
    head = seeded(CenterHead(48), dtype)
    features = torch.randn(2, 48, 12, 20, dtype=dtype)
    with torch.no_grad():
        expected, found = head(features), fold(head)(features)
    assert {name: tuple(value.shape[1:]) for name, value in expected.items()} == {
        name: (count, 12, 20) for name, count in zip(MAPS, (2, 1, 3, 2, 1, 3), strict=True)
    }
    for name, value in expected.items():
        assert relative(found[name], value) < {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    assert not [module for module in fold(head).modules() if isinstance(module, nn.BatchNorm2d)]


def test_proposals_are_local_maxima():
    heat = torch.full((1, 10, 8, 9), -4.0)
    heat[0, 2, 3, 4] = 2.0
    heat[0, 2, 3, 5] = 1.0  # beside a higher one
    heat[0, 2, 0, 4] = 3.0  # on the outermost ring
    heat[0, 5, 6, 1] = 0.0
    heat[0, 8, 2, 2] = 1.5
    heat[0, 8, 2, 3] = 1.4  # beside a higher one, but pedestrians stand close together
    heat[0, 9, 0, 0] = 0.5  # on the ring, likewise
    score, label, cell = Proposals(5, 10)(heat)
    assert label.tolist() == [[2, 8, 8, 9, 5]]
    assert cell.tolist() == [[31, 20, 21, 0, 55]]
    torch.testing.assert_close(score, torch.tensor([[2.0, 1.5, 1.4, 0.5, 0.0]]).sigmoid())
    assert (label.dtype, cell.dtype) == (torch.int32, torch.int32)


def test_proposals_without_enough_maxima_score_nothing():
    score, _, _ = Proposals(6, 3, crowded=())(torch.zeros(1, 3, 3, 3))
    assert (score > 0).sum() == 3


def test_neighbours_wrap_at_row_ends_and_are_masked_off_the_map():
    """Flat numbers as in the authors' code: (ix + dx) * 5 + (iy + dy) on a grid of 4 x 5."""
    around, outside = neighbours(torch.tensor([[7, 5, 9, 0]], dtype=torch.int32), (4, 5), 1)
    assert around.dtype == torch.int32
    assert around[0, 0].tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert around[0, 1].tolist() == [-1 + 6, 0, 1, 4, 5, 6, 9, 10, 11]  # the first stands for cell 5 itself
    assert outside[0, 1].tolist() == [True] + [False] * 8
    assert around[0, 2].tolist() == [3, 4, 5, 8, 9, 10, 13, 14, 15]  # 5, 10 and 15 start the next rows
    assert not outside[0, 2].any()
    assert outside[0, 3].tolist() == [True] * 4 + [False] * 5
    last = neighbours(torch.tensor([19], dtype=torch.int32), (4, 5), 1)[1]
    assert last[0].tolist() == [False] * 5 + [True] * 4


def test_positions_are_centres_x_first():
    found = positions(torch.tensor([[7, 19]], dtype=torch.int32), (4, 5), torch.float32)
    assert found.tolist() == [[[1.5, 2.5], [3.5, 4.5]]]


def plain_transfusion(head, features):
    """The head proposal by proposal, step by step, for one cloud in float64; returns values by name."""
    nx, ny = head.size
    bev = head.shared_conv(features.transpose(2, 3))
    heat = head.heatmap_head(bev).sigmoid()[0]
    surviving = []
    for label in range(heat.shape[0]):
        for x in range(nx):
            for y in range(ny):
                inner = 0 < x < nx - 1 and 0 < y < ny - 1
                around = heat[label, max(x - 1, 0) : x + 2, max(y - 1, 0) : y + 2]
                if label in (8, 9) or (inner and heat[label, x, y] == around.max()):
                    surviving.append((float(heat[label, x, y]), label, x, y))
    surviving.sort(reverse=True)
    cells = bev[0].flatten(1).T
    rows = []
    for score, label, x, y in surviving[: head.propose.count]:
        one_hot = torch.zeros(1, heat.shape[0], 1, dtype=heat.dtype)
        one_hot[0, label] = 1
        query = cells[x * ny + y][None] + head.class_encoding(one_hot)[0].T
        place = torch.tensor([[x + 0.5, y + 0.5]], dtype=heat.dtype)
        reach = range(-head.radius, head.radius + 1)
        flat = [(x + dx) * ny + y + dy for dx in reach for dy in reach]
        flat = torch.tensor([cell for cell in flat if 0 <= cell < nx * ny])
        key_place = torch.stack([flat // ny, flat % ny], 1).to(heat.dtype) + 0.5
        rows.append((score, label, _refine(head.decoder, query, place, cells[flat], key_place), place))
    refined = torch.cat([row[2] for row in rows]).T[None]
    values = {name: tower(refined) for name, tower in head.prediction_head.named_children()}
    values["center"] = values["center"] + torch.cat([row[3] for row in rows]).T[None]
    values["query_score"] = torch.tensor([[[row[0] for row in rows]]], dtype=heat.dtype)
    values["query_label"] = torch.tensor([[[row[1] for row in rows]]])
    return values


def _refine(decoder, query, place, keys, key_place):
    place = _embed(decoder.self_posembed, place)
    keys = keys + _embed(decoder.cross_posembed, key_place)
    query = decoder.norm1(query + _attend(decoder.self_attn, query + place, query + place))
    query = decoder.norm2(query + _attend(decoder.multihead_attn, query + place, keys))
    return decoder.norm3(query + decoder.linear2(decoder.linear1(query).relu()))


def _embed(module, place):
    return module.position_embedding_head(place.T[None])[0].T


def _attend(attention, query, keys):
    """Attention of rows [n, c] to rows [k, c], head by head."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (rows @ w.T + b for rows, w, b in zip((query, keys, keys), weights, biases, strict=True))
    depth = attention.head_dim
    heads = [slice(start, start + depth) for start in range(0, q.shape[1], depth)]
    mixed = [(q[:, own] @ k[:, own].T * depth**-0.5).softmax(-1) @ v[:, own] for own in heads]
    return attention.out_proj(torch.cat(mixed, 1))


def test_transfusion_is_its_definition():
    head = seeded(small_transfusion())
    features = torch.randn(1, 24, 16, 20, dtype=torch.float64)
    with torch.no_grad():
        found, expected = head(features), plain_transfusion(head, features)
    assert list(found) == [
        "center", "height", "dim", "rot", "vel", "iou", "heatmap", "query_score", "query_label",
    ]  # fmt: skip
    assert found["query_label"].tolist() == expected["query_label"].tolist()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(20, 16), (11, 17)], ids=str)
def test_transfusion_deploy_form(size):
    head = seeded(small_transfusion(size=size))
    deployed = fold(head)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    features = torch.randn(3, 24, size[1], size[0], dtype=torch.float64)
    with torch.no_grad():
        maps = head(features)
        for cloud in range(3):
            found = deployed(features[cloud : cloud + 1])
            assert torch.equal(found["query_label"], maps["query_label"][cloud : cloud + 1])
            for name, value in maps.items():
                assert relative(found[name], value[cloud : cloud + 1]) < 1e-9
            for own, value in zip(deployed.decode(found), head.decode(maps), strict=True):
                torch.testing.assert_close(own, value[cloud : cloud + 1], rtol=1e-9, atol=1e-9)
    assert not [module for module in deployed.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with pytest.raises(ValueError, match="one cloud, not 3"):
        deployed(features)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


def test_transfusion_is_deterministic():
    head, again = seeded(small_transfusion(), torch.float32), seeded(small_transfusion(), torch.float32)
    features = torch.randn(2, 24, 16, 20)
    with torch.no_grad():
        first, second = head(features), again(features)
    for name in first:
        assert torch.equal(first[name], second[name])
    boxes, scores, labels = head.decode(first)
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 24, 9), (2, 24), (2, 24))
    assert labels.dtype == torch.int32
    assert len(set(labels.flatten().tolist()) - {0}) >= 2


def test_transfusion_decoding():
    """Every rule of the last step by hand, for three proposals."""
    maps = {
        "center": [[10.0, 200.0, 3.0], [20.0, 0.0, 4.0]], "height": [[1.0, 0.0, 0.5]], "dim": [[0.0] * 3] * 3,
        "rot": [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], "vel": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        "iou": [[0.0, 1.0, -3.0]], "heatmap": [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], "query_score": [[0.5, 0.4, 0.3]],
    }  # fmt: skip
    maps = {name: torch.tensor([value]) for name, value in maps.items()}
    maps["query_label"] = torch.tensor([[[1, 0, 0]]], dtype=torch.int32)
    boxes, scores, labels = small_transfusion(low=(-54.0, -54.0)).decode(maps)
    assert labels.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(boxes[0, 0], torch.tensor([-48.0, -42.0, 0.5, 1, 1, 1, np.pi / 2, 0.1, 0.4]))
    torch.testing.assert_close(boxes[0, 2, 6:], torch.tensor([-np.pi / 2, 0.3, 0.6]))
    torch.testing.assert_close(scores[0], torch.tensor([(0.5 * 0.7310586) ** 0.5 * 0.5**0.5, 0.0, 0.0]))
    assert not boxes[0, 1].any()
    maps["query_score"][:] = 0
    assert not small_transfusion().decode(maps)[2].any()


@each_whole
def test_graph_agrees_in_onnx_runtime(name):
    network, bev = whole(name, torch.float32)
    graph = compile_module(network, {"bev": bev}, outputs=("boxes", "scores", "labels"), align=16)
    proto = ir.serde.serialize_model(graph)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    boxes, scores, labels = session.run(None, {"bev": bev.numpy()})
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in network(bev)]
    assert (expected[2] > 0).sum() > 5
    np.testing.assert_array_equal(labels, expected[2])
    np.testing.assert_allclose(boxes, expected[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5, atol=2e-6)
    check_nodes(onnx.inliner.inline_local_functions(proto).graph)


def check_nodes(graph):
    """No operator without a fixed shape or with integers that TensorRT does not take; few nodes around the layers."""
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"NonZero", "Unique", "Loop", "Scan", "CumSum", "ScatterND", "BatchNormalization"} & set(kinds)
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    floats = {onnx.TensorProto.FLOAT}
    assert {types.get(node.input[0], onnx.TensorProto.FLOAT) for node in graph.node if node.op_type == "Clip"} <= floats
    for value in graph.value_info:
        assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name
    assert sum(kinds.values()) < 200


@each_whole
def test_graph_agrees_on_an_empty_map(name):
    """Thousands of equal scores: both sides take the same of them."""
    network, bev = whole(name, torch.float32)
    bev = torch.zeros_like(bev)
    graph = compile_module(network, {"bev": bev}, outputs=("boxes", "scores", "labels"), align=16)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    found = session.run(None, {"bev": bev.numpy()})
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in network(bev)]
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=2e-5)


@each_whole
def test_graph_builds_in_tensorrt_rtx(name, tmp_path):
    network, bev = whole(name, torch.float32)
    graph = compile_module(network, {"bev": bev}, outputs=("boxes", "scores", "labels"), align=16)
    path = tmp_path / "graph.onnx"
    path.write_bytes(ir.serde.serialize_model(graph).SerializeToString())
    result = rtx_check(path)
    if result["verdict"] == "skipped":
        pytest.skip(result["reason"])
    assert result["verdict"] == "pass", result


def test_float16_leaves_boxes_in_their_places():
    """Flat cells up to 32,400 and positions far from the origin need float32; features do not."""
    head = small_transfusion(8, size=(180, 180), low=(-54.0, -54.0), proposals=40)
    network = Whole(nn.Identity(), seeded(head, torch.float32))
    bev = torch.randn(1, 8, 180, 180)
    graph = compile_module(network, {"bev": bev}, outputs=("boxes", "scores", "labels"))
    parts = ("propose", "positions", "shift", "decode*")
    to_float16(graph, [f"dense_head.{part}" for part in parts])
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    boxes, scores, labels = (value[0] for value in session.run(None, {"bev": bev.numpy()}))
    with torch.no_grad():
        expected = Detections(*(tensor[0].numpy() for tensor in network(bev)))
    # Rounding exchanges some proposals of nearly equal heat: what matters is where the common ones are.
    common = match(Detections(boxes, scores, labels), expected, 0.5, flat=True)
    close = match(Detections(boxes, scores, labels), expected, 0.97, flat=True)
    assert close.matched >= 0.9 * common.matched >= 0.9 * 15
    assert np.abs(boxes[:, :2]).max() > 45
