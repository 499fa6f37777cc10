"""GhostNetV2: modules against the golden operator file, the deploy form channel by channel, odd and dynamic sizes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeattn.data import seeded_images
from edgeattn.export import compile_module
from edgeattn.kernels import upsample_gate_mul
from edgeattn.model import MODELS
from edgeattn.models._channels import Channels
from edgeattn.models.ghostnetv2 import Bottleneck, GhostModule, GhostNetV2
from edgeattn.tensors import Dim
from edgeattn.weights import seed_weights

FILES = Path(__file__).parent / "golden" / "ops"
CASES = json.loads((FILES / "dfc_attention.json").read_text())["cases"]
ARRAYS = np.load(FILES / "dfc_attention.npz")
GHOSTS = [name for name, case in CASES.items() if case["module"] == "GhostModuleV2"]
BOTTLENECKS = [name for name, case in CASES.items() if case["module"] == "GhostBottleneckV2"]
# Largest difference over largest value, as in golden/README.md.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def build(name):
    case = CASES[name]
    if name in GHOSTS:
        return GhostModule(case["inp"], case["oup"], relu=True, gated=True)
    widths = [case[key] for key in ("in_chs", "mid_chs", "out_chs", "kernel", "stride")]
    return Bottleneck(*widths, se=case["se_ratio"] > 0, gated=case["layer_id"] > 1)


def seeded(module, dtype=torch.float32):
    seed_weights(module)
    return module.eval().to(dtype)


def golden(name, dtype):
    return (torch.from_numpy(ARRAYS[f"{name}.{tensor}"]).to(dtype) for tensor in "xy")


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", list(CASES))
@each_dtype
def test_module_agrees_with_golden(name, dtype):
    module = build(name)
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == CASES[name]["state_dict"]
    x, y = golden(name, dtype)
    with torch.no_grad():
        assert error(seeded(module, dtype)(x), y) < LIMITS[dtype]


def spread(x, channels):
    stored = x.new_full((x.shape[0], channels.width, *x.shape[2:]), 7.0)  # what lies elsewhere must not matter
    stored[:, list(channels.places)] = x
    return stored


@pytest.mark.parametrize("name", BOTTLENECKS)
@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("inputs", ["joined", "halves"])
def test_stored_bottleneck_agrees_with_golden(name, align, inputs):
    module = seeded(build(name), torch.float64)
    x, y = golden(name, torch.float64)
    before = getattr(Channels, inputs)(x.shape[1], align)
    stored, after = module.stored(before, align)
    with torch.no_grad():
        out = stored(spread(x, before))
    assert out.shape[1] == after.width
    assert error(out[:, list(after.places)], y) < 1e-6


@pytest.mark.parametrize("name", GHOSTS)
@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("form", ["joined", "halves"])
def test_stored_ghost_module_agrees_with_golden(name, align, form):
    module = seeded(build(name), torch.float64)
    x, y = golden(name, torch.float64)
    before, after = Channels.joined(x.shape[1], align), getattr(Channels, form)(y.shape[1], align)
    with torch.no_grad():
        out = module.stored(before, after, align)(spread(x, before))
    assert error(out[:, list(after.places)], y) < 1e-6


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize(("scale", "size"), [(1.0, (2, 67, 97)), (1.3, (1, 65, 40)), (1.6, (1, 33, 64))])
def test_deploy_is_exact_at_odd_sizes(scale, size, align):
    model = seeded(GhostNetV2(scale), torch.float64)
    image = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
    with torch.no_grad():
        assert error(model.deploy(align)(image), model(image)) < 1e-9


def test_deploy_pads_to_the_alignment_and_not_at_all_without():
    model = GhostNetV2(1.0)
    assert {width % 16 for width in depthwise_widths(model.deploy(16))} == {0}
    assert depthwise_widths(model.deploy(1)) == depthwise_widths(model)


def depthwise_widths(module):
    convs = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
    return {conv.out_channels for conv in convs if conv.groups > 1}


def test_gate_index_is_the_exact_floor_for_every_pooled_size():
    for size in range(2, 700):
        coarse = torch.arange(size // 2, dtype=torch.float64).reshape(1, 1, -1, 1)
        logits = (coarse / 1000 + 0.1).logit()
        spread = upsample_gate_mul.op(torch.ones(1, 1, size, 1, dtype=torch.float64), logits)
        found = ((spread - 0.1) * 1000).round().long().flatten()
        assert torch.equal(found, torch.arange(size) * (size // 2) // size), size


def run(graph, image):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    data = ir.serde.serialize_model(graph).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


HEIGHT, WIDTH = Dim("height", 97, 224, 512), Dim("width", 97, 224, 512)
DYNAMIC = (Dim("batch", 1, 1, 8), 3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 3, 97, 131), [(1, 97, 131)]),
        ((2, 3, 33, 64), [(2, 33, 64)]),
        (DYNAMIC, [(1, 224, 224), (2, 97, 131), (1, 255, 98), (3, 101, 160)]),
    ],
    ids=["static-odd", "static-small", "dynamic"],
)
def test_exported_graph_has_one_node_per_gate_and_agrees(shape, sizes):
    model = seeded(MODELS.get("ghostnetv2_1.0").build())
    example = torch.randn([2 * size.min if isinstance(size, Dim) else size for size in shape])
    graph = compile_module(model, {"image": example}, outputs=("logits",), align=16, shapes={"image": shape})
    names = Counter(node.op_type.split("_")[0] for node in graph.graph)
    assert names["EdgeUpsampleGateMul"] == 14
    for batch, *size in sizes:
        image = torch.from_numpy(seeded_images(0, (batch, 3, *size)))
        with torch.no_grad():
            assert error(run(graph, image), model(image)) < 1e-5
