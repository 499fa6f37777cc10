"""Every op, every case, every contract: torch form, fake, ONNX body static and dynamic, schema, gradient."""

import pytest
import torch

from edgeattn import expr, signature
from edgeattn.errors import UsageError
from edgeattn.op import OPS, Op, decomposed
from edgeattn.testing import as_tuple, check_body, check_torch, compare, expected_outputs

CASES = [(op, case) for op in OPS for case in op.cases]
IDS = [f"{op.name}-{i}" for op in OPS for i, _ in enumerate(op.cases)]
each_case = pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
each_op = pytest.mark.parametrize("op", list(OPS), ids=OPS.names())
SMOOTH = [op for op in OPS if all(output.dtype == "T" for output in op.signature.outputs)]


def test_first_set_is_complete():
    wanted = {
        "single_head_attention", "window_attention", "hybrid_window_attention", "selective_scan", "haar_dwt",
        "haar_idwt", "upsample_gate_mul",
    }  # fmt: skip
    assert wanted <= set(OPS.names())


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_form(op, case, dtype):
    check_torch(op, case, dtype)


@each_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_body_float32(op, case, dynamic):
    check_body(op, case, torch.float32, dynamic=dynamic)


@each_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_body_float16(op, case, dynamic):
    check_body(op, case, torch.float16, dynamic=dynamic)


@each_case
def test_float64_torch_form_is_exact(op, case):
    inputs = op.example(case, torch.float64)
    _, attributes = op.split_case(case)
    found = as_tuple(op(*inputs, **attributes))
    for value, want in zip(found, expected_outputs(op, inputs, attributes), strict=True):
        assert float((value - want).abs().max()) <= 1e-11 * float(want.abs().max())


@each_op
def test_outputs_do_not_depend_on_uninitialised_memory(op, nan_empty):
    case = op.cases[0]
    _, attributes = op.split_case(case)
    inputs = op.example(case)
    found = as_tuple(op(*inputs, **attributes))
    compare(op, found, expected_outputs(op, inputs, attributes), torch.float32)


@pytest.mark.parametrize("op", SMOOTH, ids=[op.name for op in SMOOTH])
def test_gradient_is_that_of_the_reference(op):
    case = op.cases[0]
    _, attributes = op.split_case(case)
    gradients = []
    for call in (op, op.call_reference):
        inputs = op.example(case, torch.float64)
        wanted = [tensor.requires_grad_() for tensor in inputs if tensor.is_floating_point()]
        call(*inputs, **attributes).square().sum().backward()
        gradients.append([tensor.grad for tensor in wanted])
    for own, want in zip(*gradients, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9)


@each_op
def test_decomposed_runs_the_reference(op):
    case = op.cases[0]
    _, attributes = op.split_case(case)
    inputs = op.example(case)
    with decomposed():
        found = as_tuple(op(*inputs, **attributes))
    for value, want in zip(found, as_tuple(op.call_reference(*inputs, **attributes)), strict=True):
        assert torch.equal(value, want)


@each_op
def test_wrong_arguments_are_refused_by_name(op):
    inputs = op.example(op.cases[0])
    _, attributes = op.split_case(op.cases[0])
    with pytest.raises(UsageError, match=r"EA0110.*expects"):
        op(*inputs[:-1], **attributes)
    first = op.signature.inputs[0].name
    with pytest.raises(UsageError, match=rf"EA0110.*{first} must be"):
        op(inputs[0][0], *inputs[1:], **attributes)
    with pytest.raises(UsageError, match=r"EA0110.*attributes"):
        op(*inputs, **attributes, nonsense=1)


def test_signature_with_expressions_types_and_several_outputs():
    parsed = signature.parse("(x[b c h], i: int32[b 4], *, n: int, w: ints) -> (y[b 4*c cdiv(h, 2)], m: int32[n])")
    assert [tensor.dtype for tensor in parsed.inputs] == ["T", "int32"]
    assert parsed.attributes == {"n": "int", "w": "ints"}
    assert parsed.outputs[0].dims == ("b", "4*c", "cdiv(h, 2)")
    sizes = parsed.bind("op", [(2, 3, 7), (2, 4)])
    assert parsed.output_shapes({**sizes, "n": 5}) == [(2, 12, 4), (5,)]
    with pytest.raises(UsageError, match="i has b = 3, expected 2"):
        parsed.bind("op", [(2, 3, 7), (3, 4)])


def test_several_and_integer_outputs_through_the_whole_op():
    """An op like the DSVT partition: two outputs, one int32, sized by an attribute."""
    op = Op("test_two_outputs", "(x[n c], *, k: int) -> (top[k c], index: int32[k c])")

    @op.reference
    def reference(x, *, k):
        values, index = x.topk(k, dim=0)
        return values, index.to(torch.int32)

    @op.onnx
    def body(dims, attributes, dtype):
        return f"""
            size = Constant<value_ints = [{attributes["k"]}]>()
            top, wide = TopK<axis = 0>(x, size)
            index = Cast<to = 6>(wide)
        """

    case = {"n": 9, "c": 5, "k": 4}
    check_torch(op, case, torch.float32)
    check_body(op, case, torch.float32)
    check_body(op, case, torch.float16, dynamic=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4*c", 12), ("cdiv(h, 2)", 4), ("min(c, h) + 1", 4), ("max(c, h)//2 - 1", 2), ("7", 7)],
)
def test_expressions(text, value):
    assert expr.evaluate(text, {"c": 3, "h": 7}) == value


@pytest.mark.parametrize("text", ["c / 2", "c ** 2", "__import__('os')", "c if h else 1", "c.real", "1.5", "c +"])
def test_expressions_outside_the_language_are_refused(text):
    with pytest.raises(ValueError, match=r"language|expression"):
        expr.evaluate(text, {"c": 3, "h": 7})
