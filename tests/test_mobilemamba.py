"""MobileMamba: ops and modules against the golden operator files, the scan at every length, and the exported graph."""

import json
from pathlib import Path

import numpy as np
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeattn.data import seeded_images
from edgeattn.export import compile_module
from edgeattn.export.lower import edge_nodes
from edgeattn.kernels import haar_dwt, haar_idwt, selective_scan
from edgeattn.model import MODELS
from edgeattn.models._layers import fold
from edgeattn.models.mobilemamba import MultiReceptive, Scan2d, ScanTokens, WaveletScan
from edgeattn.tensors import Dim
from edgeattn.testing import check_body
from edgeattn.weights import seed_weights

FILES = Path(__file__).parent / "golden" / "ops"
# Largest difference over largest value, as in golden/README.md.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def cases(name):
    return json.loads((FILES / f"{name}.json").read_text())["cases"]


def arrays(name, case, dtype):
    """Return the tensors of one golden case by name."""
    stored = np.load(FILES / f"{name}.npz")
    return {
        key.split(".")[1]: torch.from_numpy(stored[key]).to(dtype) for key in stored.files if key.startswith(f"{case}.")
    }


def seeded(module, dtype=torch.float32):
    seed_weights(module)
    return module.eval().to(dtype)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def scan_groups(given, groups, softplus):
    """Run the golden layout, the channels of all groups side by side, as one call of the op per group."""
    channels = given["u"].shape[1] // groups
    skip, bias = (given.get(name, given["A"].new_zeros(channels * groups)) for name in ("D", "delta_bias"))
    outputs = []
    for group in range(groups):
        own, one = slice(group * channels, (group + 1) * channels), slice(group, group + 1)
        inputs = [given["u"][:, None, own], given["delta"][:, None, own], given["A"][None, own]]
        inputs += [given["B"][:, one], given["C"][:, one], skip[None, own], bias[None, own]]
        outputs.append(selective_scan.op(*inputs, directions=[0], delta_softplus=int(softplus)))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("case", list(cases("selective_scan")))
@each_dtype
def test_scan_agrees_with_golden(case, dtype):
    entry, given = cases("selective_scan")[case], arrays("selective_scan", case, dtype)
    assert error(scan_groups(given, entry["groups"], entry["softplus"]), given["y"]) < LIMITS[dtype]


@pytest.mark.parametrize("case", list(cases("cross_scan_k2")))
def test_directions_visit_in_the_golden_orders(case):
    """Without decay, and with drives and read-outs of one, the scan is a running sum: it shows the order of visits."""
    given = arrays("cross_scan_k2", case, torch.float64)
    x = given["x"].flatten(2)
    one, nothing = torch.ones_like(x), x.new_zeros(1, x.shape[1])
    sums = []
    for way in (0, 1):
        inputs = (x[:, None], one[:, None], nothing[..., None], one[:, None, :1], one[:, None, :1], nothing, nothing)
        sums.append(selective_scan.op(*inputs, directions=[way], delta_softplus=0))
        visited = given["xs"][:, way].cumsum(-1)
        torch.testing.assert_close(sums[way], visited.flip(-1) if way else visited)
    inputs = (x[:, None], one[:, None].expand(-1, 2, -1, -1), nothing[..., None].expand(2, -1, -1))
    ones, nothing = one[:, None, :1].expand(-1, 2, -1, -1), nothing.expand(2, -1)
    both = selective_scan.op(*inputs, ones, ones, nothing, nothing, directions=[0, 1], delta_softplus=0)
    torch.testing.assert_close(both, sums[0] + sums[1])


@pytest.mark.parametrize("case", list(cases("haar")))
@each_dtype
def test_haar_agrees_with_golden(case, dtype):
    given = arrays("haar", case, dtype)
    nothing = torch.zeros_like(given["x"])
    bands = haar_dwt.op(given["x"])
    assert error(bands, given["sub"].flatten(1, 2)) < LIMITS[dtype]
    assert error(haar_idwt.op(bands, nothing), given["back"]) < LIMITS[dtype]
    assert error(haar_idwt.op(given["z"].flatten(1, 2), nothing), given["inv"]) < LIMITS[dtype]


@pytest.mark.parametrize("case", list(cases("ss2d_k2")))
@pytest.mark.parametrize("scale", [1.0, 0.5])
@each_dtype
def test_scan_block_agrees_with_golden(case, scale, dtype):
    entry, given = cases("ss2d_k2")[case], arrays("ss2d_k2", case, dtype)
    module = Scan2d(entry["d_model"], entry["d_inner"])
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == entry["state_dict"]
    module = seeded(module, dtype)
    with torch.no_grad():
        assert error(module(given["x"]), given["y"]) < LIMITS[dtype]
        deployed = ScanTokens(module, torch.full((1, entry["d_model"], 1, 1), scale))
        assert error(deployed(given["x"]), scale * given["y"]) < LIMITS[dtype]


@pytest.mark.parametrize("case", list(cases("wavelet_mamba")))
@pytest.mark.parametrize("align", [0, 1, 16])
@each_dtype
def test_branches_agree_with_golden(case, align, dtype):
    entry, given = cases("wavelet_mamba")[case], arrays("wavelet_mamba", case, dtype)
    if entry["module"] == "MBWTConv2d":
        module = WaveletScan(entry["channels"], entry["kernel"])
    else:
        module = MultiReceptive(entry["dim"], {7: 0, 5: 1, 3: 2}[entry["kernel"]])
    assert sorted([key, list(value.shape)] for key, value in module.state_dict().items()) == sorted(entry["state_dict"])
    module = seeded(module, dtype)
    with torch.no_grad():
        assert error((fold(module, align) if align else module)(given["x"]), given["y"]) < LIMITS[dtype]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9, 10, 16, 31, 144, 257])
@pytest.mark.parametrize("directions", [[0], [1], [0, 1]], ids=str)
def test_body_of_every_length(length, directions):
    """Products of up to nine tokens, chunks that the length does and does not fill, and both orders of visiting."""
    case = dict(b=2, j=1, k=len(directions), d=5, s=1, l=length, directions=directions, delta_softplus=1)
    check_body(selective_scan.op, case, torch.float32, dynamic=False)


@pytest.mark.parametrize("length", [9, 49])
@pytest.mark.parametrize("rate", [-0.01, -30.0])
def test_fast_form_with_slow_and_strong_decay(length, rate):
    case = dict(b=1, j=1, k=2, d=8, s=1, l=length, directions=[0, 1], delta_softplus=1)
    inputs = selective_scan.op.example(case, torch.float64)
    inputs[2] = torch.full_like(inputs[2], rate)
    attributes = dict(directions=[0, 1], delta_softplus=1)
    expected = selective_scan.reference(*inputs, **attributes)
    assert error(selective_scan.op(*inputs, **attributes), expected) < 1e-12


def test_exported_nodes():
    model = MODELS.get("mobilemamba_t2")
    module = seeded(model.build())
    graph = compile_module(module, {"image": torch.zeros(model.inputs[0].dims)}, outputs=("logits",), align=16)
    found = [op.name for _, op in edge_nodes(graph)]
    assert {name: found.count(name) for name in found} == {"selective_scan": 5, "haar_dwt": 5, "haar_idwt": 5}
    flat = onnx.inliner.inline_local_functions(ir.serde.serialize_model(graph)).graph
    assert sum(node.op_type != "Constant" for node in flat.node) <= 720
    assert not {"BatchNormalization", "Identity", "Cast", "Scan", "Loop"} & {node.op_type for node in flat.node}


@pytest.mark.parametrize("moving", ["batch", "size"])
def test_one_graph_for_moving_sizes(moving):
    """A moving batch keeps the specialised bodies; a moving size takes the generic ones."""
    module = seeded(MODELS.get("mobilemamba_t2").build())
    sizes = (Dim("height", 96, 160, 200), Dim("width", 96, 192, 200)) if moving == "size" else (128, 160)
    shapes = {"image": (Dim("batch", 1, 2, 4), 3, *sizes)}
    example = torch.zeros(2, 3, *(size.opt if isinstance(size, Dim) else size for size in sizes))
    graph = compile_module(module, {"image": example}, outputs=("logits",), shapes=shapes, align=16)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    for batch, height, width in [(1, 97, 193), (3, 200, 96)] if moving == "size" else [(1, 128, 160), (4, 128, 160)]:
        images = seeded_images(batch, (batch, 3, height, width))
        with torch.no_grad():
            expected = module(torch.from_numpy(images))
        found = torch.from_numpy(session.run(None, {"image": images})[0])
        assert error(found, expected) < 1e-5, (batch, height, width)
