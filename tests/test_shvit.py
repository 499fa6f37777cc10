"""SHViT: modules against the golden operator file, exact folding, and the exported graph: nodes and moving sizes."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.data import seeded_images
from edgeattn.export import compile_module
from edgeattn.export.lower import edge_nodes
from edgeattn.model import MODELS
from edgeattn.models._layers import Merge, NormLinear, SqueezeExcite, fold, fuse_conv_norm
from edgeattn.models.shvit import SingleHeadAttention
from edgeattn.tensors import Dim
from edgeattn.weights import seed_weights

FILES = Path(__file__).parent / "golden" / "ops"
CASES = json.loads((FILES / "shsa.json").read_text())["cases"]
ARRAYS = np.load(FILES / "shsa.npz")
# Largest difference over largest value, as in golden/README.md.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def build(name):
    case = CASES[name]
    if case["module"] == "SHSA":
        return SingleHeadAttention(case["dim"], case["pdim"])
    return Merge(case["dim"], case["out_dim"])


def seeded(module, dtype=torch.float32):
    seed_weights(module)
    return module.eval().to(dtype)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("form", ["original", "deploy"])
@each_dtype
def test_module_agrees_with_golden(name, form, dtype):
    module = build(name)
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == CASES[name]["state_dict"]
    module = seeded(module, dtype)
    x, y = (torch.from_numpy(ARRAYS[f"{name}.{tensor}"]).to(dtype) for tensor in "xy")
    with torch.no_grad():
        assert error((module if form == "original" else fold(module))(x), y) < LIMITS[dtype]


@pytest.mark.parametrize(("width", "hidden"), [(512, 128), (1232, 312), (16, 8), (24, 8), (896, 224)])
def test_gate_width_is_a_multiple_of_eight(width, hidden):
    assert SqueezeExcite(width).fc1.out_channels == hidden


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_convolution_takes_the_norm(bias, groups):
    conv = nn.Conv2d(6, 6, (3, 5), 2, (1, 2), groups=groups, bias=bias, padding_mode="reflect").double()
    norm = seeded(nn.BatchNorm2d(6, eps=1e-3), torch.float64)
    before = copy.deepcopy((conv.state_dict(), norm.state_dict()))
    fused = fuse_conv_norm(conv, norm)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=0, atol=1e-14)
    for state, module in zip(before, (conv, norm), strict=True):
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [(3, 3), (7, 5), (1, 1)])
def test_depthwise_convolution_takes_the_skip(kernel):
    conv = nn.Conv2d(6, 6, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=6, bias=False).double()
    norm = seeded(nn.BatchNorm2d(6), torch.float64)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    fused = fuse_conv_norm(conv, norm, skip=True)
    torch.testing.assert_close(fused(x), x + norm(conv(x)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_is_done_in_float64_and_keeps_the_dtype(dtype):
    """The folded weight is the exact product rounded once, not a product of rounded factors."""
    conv, norm = nn.Conv2d(8, 8, 1, bias=False).to(dtype), seeded(nn.BatchNorm2d(8)).to(dtype)
    fused = fuse_conv_norm(conv, norm)
    wide = fuse_conv_norm(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    assert fused.weight.dtype is fused.bias.dtype is dtype
    assert torch.equal(fused.weight, wide.weight.to(dtype))
    assert torch.equal(fused.bias, wide.bias.to(dtype))


def test_classifier_takes_its_norm():
    head = seeded(NormLinear(12, 7), torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    folded = fold(head)
    assert isinstance(folded, nn.Linear)
    torch.testing.assert_close(folded(x), head(x), rtol=0, atol=1e-14)


def test_deploy_form_has_no_norms_and_shares_nothing():
    module = seeded(MODELS.get("shvit_s1").build()).train()
    deployed = module.deploy()
    assert module.training
    assert not any(part.training for part in deployed.modules())
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) for part in deployed.modules())
    owned = {value.data_ptr() for value in module.state_dict().values()}
    assert not any(value.data_ptr() in owned for value in deployed.state_dict().values())


@pytest.mark.parametrize(("name", "most", "attentions"), [("shvit_s1", 250, 9), ("shvit_s4", 350, 13)])
def test_exported_nodes(name, most, attentions):
    model = MODELS.get(name)
    module = seeded(model.build())
    graph = compile_module(module, {"image": torch.zeros(model.inputs[0].dims)}, outputs=("logits",), align=16)
    assert [op.name for _, op in edge_nodes(graph)] == ["single_head_attention"] * attentions
    flat = onnx.inliner.inline_local_functions(ir.serde.serialize_model(graph)).graph
    assert sum(node.op_type != "Constant" for node in flat.node) <= most
    assert not {"BatchNormalization", "Identity", "Cast"} & {node.op_type for node in flat.node}


def test_one_graph_for_every_batch_and_size():
    module = seeded(MODELS.get("shvit_s1").build())
    shape = (Dim("batch", 1, 4, 2), 3, Dim("height", 97, 300, 128), Dim("width", 97, 300, 160))
    graph = compile_module(module, {"image": torch.zeros(2, 3, 128, 160)}, outputs=("logits",), shapes={"image": shape})
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    for batch, height, width in ((1, 97, 97), (3, 129, 263), (4, 300, 113)):
        images = seeded_images(batch, (batch, 3, height, width))
        with torch.no_grad():
            expected = module(torch.from_numpy(images))
        found = torch.from_numpy(session.run(None, {"image": images})[0])
        assert error(found, expected) < 1e-5, (batch, height, width)
