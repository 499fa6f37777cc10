"""EMOv2: operators and blocks against the golden file, the window partitions, padding, the deploy form, the export."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from edgeattn.data import seeded_images
from edgeattn.errors import UsageError
from edgeattn.export import compile_module
from edgeattn.kernels import hybrid_window_attention, window_attention
from edgeattn.kernels._windows import window_pixels, window_returns
from edgeattn.model import MODELS
from edgeattn.models.emov2 import Block, EMOv2, HybridAttention
from edgeattn.tensors import Dim
from edgeattn.weights import seed_weights

FILES = Path(__file__).parent / "golden" / "ops"
CASES = json.loads((FILES / "emo_window_attention.json").read_text())["cases"]
ARRAYS = np.load(FILES / "emo_window_attention.npz")
BLOCKS = [name for name, case in CASES.items() if case["kind"] == "iiRMB"]
INTERVALS = {"remote": [0, 0], "close": [1, 1]}
# Largest difference over largest value, as in golden/README.md.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
# A small network with every kind of block; six heads of 5 channels are padded to 8 at an alignment of 16.
SMALL = ((2, 2, 2, 2), (8, 12, 24, 32), (2.0, 2.5, 1.25, 2.0), 4, 3)


def block(case):
    late = case["norm"] == "ln_2d"
    heads = {"head_width": case["dim_head"], "window": case["window"]} if case["operator"] == "hybrid" else {}
    return Block(case["dim_in"], case["dim_out"], case["exp_ratio"], case["stride"], late=late, **heads)


def seeded(module, dtype=torch.float32):
    seed_weights(module)
    return module.eval().to(dtype)


def golden(name, dtype):
    return (torch.from_numpy(ARRAYS[f"{name}.{tensor}"]).to(dtype) for tensor in "xy")


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def single_grid(module, x, interval):
    """Run the parameters of a hybrid attention in one partition only, as the single-grid operators do."""
    (height, width), side = x.shape[2:], module.window
    x = F.pad(x, (0, -width % side, 0, -height % side))
    options = {"num_heads": module.heads, "window": [side, side], "interval": interval, "scale": module.scale}
    return window_attention.op(*module.qk(x), module.v(x), **options)[:, :, :height, :width]


@pytest.mark.parametrize("name", list(CASES))
@each_dtype
def test_module_agrees_with_golden(name, dtype):
    case = CASES[name]
    widths = [case[key] for key in ("dim_in", "dim_mid", "dim_head", "window") if key in case]
    module = block(case) if name in BLOCKS else HybridAttention(*widths, torch.nn.GELU())
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == case["state_dict"]
    x, y = golden(name, dtype)
    module = seeded(module, dtype)
    with torch.no_grad():
        out = single_grid(module, x, INTERVALS[case["kind"]]) if case["kind"] in INTERVALS else module(x)
    assert error(out, y) < LIMITS[dtype]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("align", [1, 16])
def test_folded_block_agrees_with_golden(name, align):
    x, y = golden(name, torch.float64)
    folded = seeded(block(CASES[name]), torch.float64).folded(align)
    with torch.no_grad():
        assert error(folded(x), y) < 1e-6
    assert folded.local.out_channels % align == 0


@pytest.mark.parametrize("interval", [[0, 0], [1, 1], [2, 1], [0, 2]], ids=str)
@pytest.mark.parametrize(("size", "window"), [((12, 24), (3, 4)), ((14, 14), (7, 7)), ((8, 24), (4, 6))], ids=str)
def test_partition_follows_the_definition_and_covers_every_pixel_once(size, window, interval):
    windows = window_pixels(*size, window, interval)
    steps = [step or axis // side for step, axis, side in zip(interval, size, window, strict=True)]
    for y in range(size[0]):
        for x in range(size[1]):
            places = [
                ((p // (side * step)) * step + p % step, p // step % side)
                for p, side, step in zip((y, x), window, steps, strict=True)
            ]
            number = places[0][0] * (size[1] // window[1]) + places[1][0]
            assert windows[number, places[0][1] * window[1] + places[1][1]] == y * size[1] + x
    assert sorted(windows.reshape(-1)) == list(range(size[0] * size[1]))
    heads = 3
    listed = (windows[:, None, :] * heads + np.arange(heads)[:, None]).reshape(-1)
    (back,) = window_returns([windows], heads)
    assert np.array_equal(listed[back], np.arange(listed.size).reshape(-1, heads))


def hybrid_inputs(h, w):
    inputs = [torch.randn(2, channels, h, w, dtype=torch.float64) for channels in (10, 10, 14)]
    return inputs, {"num_heads": 2, "window": [5, 3], "scale": 0.7}


def test_hybrid_is_the_sum_of_both_partitions():
    inputs, options = hybrid_inputs(15, 6)
    parts = [window_attention.op(*inputs, interval=interval, **options) for interval in INTERVALS.values()]
    assert error(hybrid_window_attention.op(*inputs, **options), sum(parts)) < 1e-12
    assert error(parts[0], parts[1]) > 1e-2


def test_hybrid_in_one_window_is_twice_one_partition():
    inputs, options = hybrid_inputs(5, 3)
    once = window_attention.op(*inputs, interval=[1, 1], **options)
    assert error(hybrid_window_attention.op(*inputs, **options), 2 * once) < 1e-12


def test_padded_pixels_take_part_in_the_softmax():
    module = seeded(HybridAttention(8, 12, 4, 3, torch.nn.GELU()), torch.float64)
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64)
    whole = F.pad(x, (0, 1, 0, 2))  # a map of whole windows that ends in zeros is the same to the operator
    with torch.no_grad():
        assert error(module(x), module(whole)[:, :, :4, :5]) < 1e-12
        module.qk.conv.bias += 1
        module.v.conv.bias += 1
        assert error(module(x), module(whole)[:, :, :4, :5]) < 1e-12


@pytest.mark.parametrize(("h", "w", "heads", "reason"), [(7, 6, 2, "h = 7"), (10, 4, 2, "w = 4"), (10, 6, 3, "c = 10")])
def test_partial_windows_and_heads_are_refused(h, w, heads, reason):
    inputs, options = hybrid_inputs(h, w)
    with pytest.raises(UsageError, match=rf"EA0110.*{reason}"):
        hybrid_window_attention.op(*inputs, **{**options, "num_heads": heads})
    with pytest.raises(UsageError, match=rf"EA0110.*{reason}"):
        window_attention.op(*inputs, interval=[1, 1], **{**options, "num_heads": heads})


@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("size", [(2, 96, 96), (1, 97, 131), (3, 33, 64)], ids=str)
def test_deploy_is_exact_at_odd_sizes(size, align):
    model = seeded(EMOv2(*SMALL, classes=20), torch.float64)
    image = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        assert error(model.deploy(align)(image), expected) < 1e-12
        assert torch.equal(model(image), expected)  # the original is left as it was


def test_deploy_has_no_norm_scale_or_linear_layer_that_could_be_folded():
    model = EMOv2(*SMALL)
    deployed = model.deploy(16)
    kinds = Counter(type(part).__name__ for part in deployed.modules())
    assert not {"BatchNorm2d", "LayerScale", "QueryKey"} & set(kinds)
    convs = [part for part in deployed.modules() if isinstance(part, torch.nn.Conv2d)]
    originals = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(convs) == len(originals) - 1 + kinds["SeparateQueryKey"]  # the stem's last one is merged
    assert all(part.scale == 1.0 for part in deployed.modules() if isinstance(part, HybridAttention))
    assert {conv.out_channels % 16 for conv in convs if conv.kernel_size == (5, 5)} == {0}
    widths = [[c.out_channels for c in net.modules() if isinstance(c, torch.nn.Conv2d) and c.kernel_size == (5, 5)]
              for net in (model, model.deploy(1))]  # fmt: skip
    assert widths[0] == widths[1]


def run(graph, image):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    data = ir.serde.serialize_model(graph).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


BATCH, HEIGHT, WIDTH = Dim("batch", 1, 1, 8), Dim("height", 97, 224, 512), Dim("width", 97, 224, 512)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 3, 97, 131), [(1, 97, 131)]),
        ((2, 3, 224, 448), [(2, 224, 448)]),
        ((BATCH, 3, 224, 224), [(1, 224, 224), (3, 224, 224)]),
        ((BATCH, 3, HEIGHT, WIDTH), [(1, 224, 224), (2, 97, 131), (3, 101, 160)]),
    ],
    ids=["padded", "two-windows", "dynamic-batch", "dynamic"],
)
def test_exported_graph_has_one_node_per_attention_and_agrees(shape, sizes):
    model = seeded(MODELS.get("emov2_1m").build())
    example = torch.randn([2 * size.min if isinstance(size, Dim) else size for size in shape])
    graph = compile_module(model, {"image": example}, outputs=("logits",), align=16, shapes={"image": shape})
    names = Counter(node.op_type.split("_")[0] for node in graph.graph)
    assert names["EdgeHybridWindowAttention"] == 9
    for batch, *size in sizes:
        image = torch.from_numpy(seeded_images(0, (batch, 3, *size)))
        with torch.no_grad():
            assert error(run(graph, image), model(image)) < 1e-5


@pytest.mark.parametrize(("name", "limit"), [("emov2_1m", 340), ("emov2_5m", 390)])
def test_exported_graph_stays_small(name, limit):
    model = seeded(MODELS.get(name).build())
    graph = compile_module(model, {"image": torch.randn(1, 3, 224, 224)}, outputs=("logits",), align=16)
    flat = onnx.inliner.inline_local_functions(ir.serde.serialize_model(graph))
    assert sum(node.op_type != "Constant" for node in flat.graph.node) <= limit
    assert {node.op_type for node in flat.graph.node} & {"Pad", "Slice", "BatchNormalization"} == set()


def test_published_files_are_the_authors():
    named = {name: MODELS.get(name) for name in MODELS.names() if name.startswith("emov2")}
    assert len(named) == 12
    with_file = {name: model.checkpoint.url for name, model in named.items() if model.checkpoint.url}
    assert set(with_file) == {"emov2_1m", "emov2_2m", "emov2_5m", "emov2_5m_512"}
    assert all(url.startswith("https://github.com/zhangzjn/data/") for url in with_file.values())
