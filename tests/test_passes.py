"""Passes: before and after, written as ONNX text, and the numbers the same; what must not match does not."""

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from edgeattn.errors import AccuracyError
from edgeattn.export.parity import run_graph
from edgeattn.export.passes import PASSES, Pass, node_count, run_passes
from edgeattn.export.precision import to_float16


def graph(text, **weights):
    """Parse `agraph (float[1,4,5,5] x) => (...) {...}`; keyword arguments become initializers."""
    declared = ", ".join(f"float{list(np.shape(value))} {name}" for name, value in weights.items()).replace(" ", " ")
    listed = re.sub(r"\) =>", f", {declared}) =>", text, count=1) if weights else text
    head = '<ir_version: 10, opset_import: ["" : 20, "edgeattn" : 1]> agraph '
    model = ir.serde.deserialize_model(parser.parse_model(head + listed))
    for name, value in weights.items():
        found = next(each for each in model.graph.inputs if each.name == name)
        found.const_value = ir.tensor(np.asarray(value, np.float32), name=name)
        model.graph.inputs.remove(found)
        model.graph.register_initializer(found)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def operators(model):
    return Counter(node.op_type for node in model.graph)


def apply(name, model, feeds):
    """Run one pass with the numeric check on; return its record."""
    step = next(each for each in PASSES if each.name == name)
    return run_passes(model, lambda each: run_graph(each, feeds), passes=[step])[0]


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_norm_before_linear_is_folded():
    model = graph(
        """(float[3,4] x) => (float[3,2] y) {
            n = BatchNormalization<epsilon = 1e-5>(x, gain, shift, mean, var)
            y = Gemm<transB = 1>(n, w, b)
        }""",
        gain=noise(4), shift=noise(4), mean=noise(4), var=np.abs(noise(4)) + 0.5, w=noise(2, 4), b=noise(2),
    )  # fmt: skip
    record = apply("fold_norms", model, {"x": noise(3, 4)})
    assert operators(model) == {"Gemm": 1}
    assert record.rewrites == 1
    assert 0 <= record.error < 1e-6


def test_norm_whose_result_is_used_twice_is_left():
    model = graph(
        """(float[3,4] x) => (float[3,2] y, float[3,4] n) {
            n = BatchNormalization(x, gain, shift, mean, var)
            y = Gemm<transB = 1>(n, w, b)
        }""",
        gain=noise(4), shift=noise(4), mean=noise(4), var=np.abs(noise(4)) + 0.5, w=noise(2, 4), b=noise(2),
    )  # fmt: skip
    assert apply("fold_norms", model, {"x": noise(3, 4)}).rewrites == 0


@pytest.mark.parametrize("scale", [np.float32(0.3), noise(1, 6, 1, 1)], ids=["scalar", "channels"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["c, s", "s, c"])
def test_scale_after_convolution_is_folded(scale, bias, order):
    weights = {"w": noise(6, 4, 1, 1), "s": scale} | ({"b": noise(6)} if bias else {})
    model = graph(
        f"""(float[2,4,5,5] x) => (float[2,6,5,5] y) {{
            c = Conv(x, w{", b" if bias else ""})
            y = Mul({order})
        }}""",
        **weights,
    )
    apply("fold_scales", model, {"x": noise(2, 4, 5, 5)})
    assert operators(model) == {"Conv": 1}


def test_spatial_scale_is_left():
    model = graph(
        "(float[2,4,5,5] x) => (float[2,6,5,5] y) { c = Conv(x, w) y = Mul(c, s) }", w=noise(6, 4, 1, 1), s=noise(5)
    )
    assert apply("fold_scales", model, {"x": noise(2, 4, 5, 5)}).rewrites == 0


DEPTHWISE = (
    "(float[2,4,5,5] x) => (float[2,4,5,5] y) {{ c = Conv<group = {group}, pads = {pads}>(x, w) y = Add({order}) }}"
)


@pytest.mark.parametrize("order", ["x, c", "c, x"])
def test_depthwise_residual_becomes_the_centre_tap(order):
    model = graph(DEPTHWISE.format(group=4, pads=[1, 1, 1, 1], order=order), w=noise(4, 1, 3, 3))
    apply("merge_residuals", model, {"x": noise(2, 4, 5, 5)})
    assert operators(model) == {"Conv": 1}


def test_dense_residual_is_left():
    model = graph(DEPTHWISE.format(group=1, pads=[1, 1, 1, 1], order="x, c"), w=noise(4, 4, 3, 3))
    assert apply("merge_residuals", model, {"x": noise(2, 4, 5, 5)}).rewrites == 0


def test_shifted_depthwise_residual_is_left():
    model = graph(DEPTHWISE.format(group=4, pads=[2, 1, 0, 1], order="x, c"), w=noise(4, 1, 3, 3))
    assert apply("merge_residuals", model, {"x": noise(2, 4, 5, 5)}).rewrites == 0


ATTENTION = """(float[2,8,9] q, float[2,8,7] k, float[2,5,7] v) => (float[2,5,9] y) {
    r = Transpose<perm = [0, 2, 1]>(q)
    p = MatMul(r, k)
    l = Mul(%s)
    a = Softmax<axis = -1>(l)
    t = Transpose<perm = [0, 2, 1]>(a)
    y = MatMul(v, t)
}"""


@pytest.mark.parametrize("order", ["p, s", "s, p"])
def test_attention_is_captured_as_one_node(order):
    model = graph(ATTENTION % order, s=np.float32(0.25))
    apply("capture_attention", model, {"q": noise(2, 8, 9), "k": noise(2, 8, 7), "v": noise(2, 5, 7)})
    assert operators(model) == {"EdgeSingleHeadAttention": 1}
    assert next(iter(model.graph)).attributes["scale"].value == pytest.approx(0.25)


def test_attention_with_a_varying_scale_is_left():
    model = graph(ATTENTION % "p, s", s=noise(9, 1))
    feeds = {"q": noise(2, 8, 9), "k": noise(2, 8, 7), "v": noise(2, 5, 7)}
    assert apply("capture_attention", model, feeds).rewrites == 0


def test_hard_sigmoid_is_one_node():
    model = graph(
        """(float[2,4,5,5] x) => (float[2,4,5,5] y) { a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }""",
        three=np.float32(3), zero=np.float32(0), six=np.float32(6),
    )  # fmt: skip
    apply("simplify", model, {"x": 4 * noise(2, 4, 5, 5)})
    assert operators(model) == {"HardSigmoid": 1}


def test_other_clips_are_left():
    model = graph(
        """(float[2,4,5,5] x) => (float[2,4,5,5] y) { a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }""",
        three=np.float32(2), zero=np.float32(0), six=np.float32(6),
    )  # fmt: skip
    assert apply("simplify", model, {"x": noise(2, 4, 5, 5)}).rewrites == 0


def test_spatial_mean_becomes_global_pooling():
    body = "{ axes = Constant<value_ints = [-1, 2]>() y = ReduceMean<keepdims = 1>(x, axes) }"
    model = graph(f"(float[2,4,5,5] x) => (float[2,4,1,1] y) {body}")
    apply("simplify", model, {"x": noise(2, 4, 5, 5)})
    assert operators(model)["GlobalAveragePool"] == 1


def test_a_pass_that_moves_the_numbers_is_named():
    def damage(model):
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001), name="w")
        return 1

    model = graph("(float[2,4,5,5] x) => (float[2,6,5,5] y) { y = Conv(x, w) }", w=noise(6, 4, 1, 1))
    with pytest.raises(AccuracyError, match=r"EA0701.*pass damage changed"):
        run_passes(
            model, lambda each: run_graph(each, {"x": noise(2, 4, 5, 5)}), passes=[Pass("damage", "nothing", damage)]
        )


def test_dump_holds_the_graph_after_every_pass(tmp_path):
    model = graph("(float[2,4,5,5] x) => (float[2,6,5,5] y) { c = Conv(x, w) y = Mul(c, s) }",
                  w=noise(6, 4, 1, 1), s=np.float32(2))  # fmt: skip
    run_passes(model, dump=tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[0] == "00-translated.txt"
    assert len(files) == len(PASSES) + 1
    assert (tmp_path / files[0]).read_text().startswith("2 nodes")
    assert (tmp_path / files[-1]).read_text().startswith("1 nodes")


HALF = """(float[2,4,5,5] x) => (float[2,4,5,5] y) {
    c = Conv(x, w)
    l = Softmax<axis = 1>(c)
    d = Conv(l, w)
    y = Add(c, d)
}"""


def test_float16_keeps_the_sensitive_part_and_the_interface():
    model = graph(HALF, w=noise(4, 4, 1, 1))
    feeds = {"x": noise(2, 4, 5, 5)}
    expected = run_graph(model, feeds)[0]
    choices = {choice.node: choice.dtype for choice in to_float16(model)}
    types = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}
    assert types == {"Conv": ir.DataType.FLOAT16, "Softmax": ir.DataType.FLOAT, "Add": ir.DataType.FLOAT16}
    assert set(choices.values()) == {"float16", "float32"}
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)
    assert model.graph.outputs[0].name == "y"
    # x, softmax in, softmax out, y: each value is cast once.
    assert operators(model)["Cast"] == 4
    found = run_graph(model, feeds)[0]
    assert 0 < np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_float16_plan_and_patterns_win():
    model = graph(HALF, w=noise(4, 4, 1, 1))
    for position, node in enumerate(model.graph):
        node.name = f"n{position}"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'part{position}', 'op']"
    choices = {each.node: each for each in to_float16(model, keep=["part0*"], plan={"n1": "float16"})}
    assert (choices["n0"].dtype, choices["n0"].reason) == ("float32", "kept by part0*")
    assert (choices["n1"].dtype, choices["n1"].reason) == ("float16", "precision plan")
    assert choices["n2"].dtype == "float16"
    assert run_graph(model, {"x": noise(2, 4, 5, 5)})[0].dtype == np.float32


def test_float16_leaves_no_duplicate_casts():
    model = graph(
        "(float[2,4] x) => (float[2,4] y) { a = Exp(x) b = Mul(a, a) c = Add(a, b) y = Mul(c, a) }",
    )
    to_float16(model)
    casts = [(node.inputs[0].name, node.attributes["to"].value) for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == len(set(casts)) == 2
    assert node_count(model) == 6
