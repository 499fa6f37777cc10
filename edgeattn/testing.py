"""The contracts of an op as functions that raise: what this repository's tests run, usable for a user's own op."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, shape_inference

from edgeattn.aot import grid_of, resolve_constants
from edgeattn.export.lower import link_bodies
from edgeattn.export.parity import run_bytes
from edgeattn.export.translate import IR_VERSION, OPSET, register_schema
from edgeattn.op import DOMAIN, Op

# Largest error relative to the RMS of the float64 reference. Half precision: inputs and outputs are rounded, the inside
# is float32.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A kernel rounds its result once, and attention weights on the way: most of this is the rounding of the result.
KERNEL_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_ONNX_TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
_INTEGERS = {"int32": onnx.TensorProto.INT32, "float32": onnx.TensorProto.FLOAT}


def check_torch(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise AssertionError unless the torch custom op agrees with the float64 reference and its fake is right."""
    inputs = op.example(case, dtype)
    _, attributes = op.split_case(case)
    found = as_tuple(op(*inputs, **attributes))
    compare(op, found, expected_outputs(op, inputs, attributes), dtype)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.torch_op, (*inputs, *attributes.values()), test_utils=tests)


def check_body(op: Op, case: Mapping[str, Any], dtype: torch.dtype, *, dynamic: bool = False) -> None:
    """Raise AssertionError unless the ONNX body, in ONNX Runtime, agrees with the float64 reference.

    With `dynamic` the dims in `op.dynamic` are symbolic and the generic body is used. The graph passes the ONNX
    checker, and shape inference through the schema gives the shapes of the outputs.
    """
    inputs = op.example(case, dtype)
    dims, attributes = op.split_case(case)
    known = {name: None if dynamic and name in op.dynamic else size for name, size in dims.items()}
    model = one_node_model(op, known, attributes, dtype)
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    linked = ir.serde.serialize_model(link_bodies(ir.serde.deserialize_model(inferred)))
    onnx.checker.check_model(linked, full_check=True)
    names = [tensor.name for tensor in op.signature.inputs]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    found = tuple(torch.from_numpy(array) for array in run_bytes(linked.SerializeToString(), feeds))
    expected = expected_outputs(op, inputs, attributes)
    compare(op, found, expected, dtype)
    if not dynamic:
        shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.output]
        assert shapes == [list(value.shape) for value in expected], f"{op.name}: inferred {shapes}"


def one_node_model(
    op: Op, dims: Mapping[str, int | None], attributes: Mapping[str, Any], dtype: torch.dtype
) -> onnx.ModelProto:
    """Return a graph of one unlinked node of `op`; a dim of None becomes a symbol of that name."""
    register_schema(op)
    own = _ONNX_TYPES[dtype]
    inputs = [
        helper.make_tensor_value_info(
            tensor.name,
            _INTEGERS.get(tensor.dtype, own),
            [int(dim) if dim.isdigit() else dims[dim] or dim for dim in tensor.dims],
        )
        for tensor in op.signature.inputs
    ]
    outputs = [
        helper.make_tensor_value_info(tensor.name, _INTEGERS.get(tensor.dtype, own), None)
        for tensor in op.signature.outputs
    ]
    names = [value.name for value in inputs], [value.name for value in outputs]
    node = helper.make_node(op.onnx_name, *names, name=op.name, domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], op.name, inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def expected_outputs(op: Op, inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return the reference in float64 on exactly these inputs."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    return as_tuple(op.call_reference(*wide, **attributes))


def compare(
    op: Op,
    found: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    tolerances: Mapping[torch.dtype, float] = TOLERANCES,
) -> None:
    """Raise AssertionError unless integers are equal and floats within the tolerance of `dtype`, shapes included.

    A float further off passes when it is one of the two numbers of its type next to the exact value: 5 times the RMS,
    rounded to bfloat16, can be off by 2e-2 of the RMS.
    """
    for formal, value, want in zip(op.signature.outputs, found, expected, strict=True):
        place = f"{op.name}.{formal.name}"
        assert value.shape == want.shape, f"{place}: shape {tuple(value.shape)}, expected {tuple(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(value, want.to(value.dtype)), f"{place}: integers differ"
            continue
        scale = float(want.square().mean().sqrt()) or 1.0
        off = (value.double() - want).abs()
        spacing = torch.finfo(value.dtype).eps * torch.exp2(torch.frexp(want)[1] - 1.0)
        error = float(off.masked_fill(off < spacing, 0.0).max()) / scale
        assert error <= tolerances[dtype], f"{place}: error {error:.1e} of the RMS, limit {tolerances[dtype]:.1e}"


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs of an op as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def check_kernel(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise AssertionError unless the Triton kernel, in Triton's interpreter, agrees with the float64 reference.

    Outputs start as NaN, so an element that the grid does not reach is an error, and so is one that it writes twice.
    """
    from triton.runtime.interpreter import InterpretedFunction

    assert op.triton is not None, f"{op.name}: has no kernel"
    inputs = op.example(case, dtype)
    dims, attributes = op.split_case(case)
    expected = expected_outputs(op, inputs, attributes)
    formals = zip(op.signature.outputs, expected, strict=True)
    found = tuple(_unwritten(formal.dtype, want, dtype) for formal, want in formals)
    constants = resolve_constants(op.triton, {**attributes, **dims, "itemsize": dtype.itemsize})
    integers = {**{name: value for name, value in attributes.items() if isinstance(value, int)}, **dims}
    tensors = dict(
        zip((each.name for each in (*op.signature.inputs, *op.signature.outputs)), (*inputs, *found), strict=True)
    )
    names = list(inspect.signature(op.triton.function).parameters)
    arguments = [tensors[name] if name in tensors else integers[name] for name in names if name not in constants]
    _mend_bfloat16()
    written = _watch_stores()
    written.clear()
    InterpretedFunction(op.triton.function)[grid_of(op.triton.grid, {**integers, **constants})](*arguments, **constants)
    places = np.concatenate([*written, np.zeros(0, np.uint64)])
    assert len(np.unique(places)) == len(places), f"{op.name}: writes an element twice"
    rows = op.specified_rows(inputs)
    if rows is not None:
        found, expected = (tuple(tensor[rows] for tensor in tensors) for tensors in (found, expected))
    compare(op, found, expected, dtype, KERNEL_TOLERANCES)


def _unwritten(kind: str, want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor for a result, filled with NaN, or with an integer that no op gives."""
    own = {"float32": torch.float32, "int32": torch.int32}.get(kind, dtype)
    return torch.full(want.shape, float("nan") if own.is_floating_point else torch.iinfo(own).min, dtype=own)


@functools.cache
def _watch_stores() -> list[np.ndarray]:
    """Return a list to which every store in Triton's interpreter adds the addresses it writes."""
    from triton.runtime.interpreter import InterpreterBuilder

    written: list[np.ndarray] = []
    store = InterpreterBuilder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)])
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_store = create_masked_store
    return written


@functools.cache
def _mend_bfloat16() -> None:
    """Make Triton's interpreter treat bfloat16 as a GPU does.

    It stores such numbers as uint16: matrix products would multiply those, and casts from float32 cut instead of
    rounding to nearest.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widen(a), widen(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
