"""Second stage: the captured program as an ONNX graph, one node of the edgeattn domain per op."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx import TypeProto, defs
from onnxscript.values import Opset

from edgeattn import signature
from edgeattn.errors import EdgeAttnError, UnsupportedError
from edgeattn.export.trace import Shapes, first_line, quiet
from edgeattn.op import DOMAIN, OPS, Op
from edgeattn.tensors import Dim

OPSET = 20
IR_VERSION = 10
_ONNX_TYPES = {"T": "T", "float32": "tensor(float)", "int32": "tensor(int32)"}
_ELEM_TYPES = {"float32": 1, "int32": 6}
_ATTRIBUTE_TYPES = {
    "int": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "ints": defs.OpSchema.AttrType.INTS,
}
_FAILED_NODE = re.compile(r"Error when translating node %(\w+)")
# Stack traces name files of this machine; the FX text repeats the graph.
_DROPPED_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def translate(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: Shapes | None = None,
) -> ir.Model:
    """Return the ONNX graph of `program` at opset 20, its dynamic sizes named as in `shapes`.

    Raises EA0401 naming the operator that has no translation.
    """
    table = translation_table()
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=table,
            )
    except EdgeAttnError:
        raise
    except Exception as error:
        raise _explain(error, program) from error
    assert exported is not None
    model: ir.Model = exported.model
    model.ir_version = IR_VERSION
    model.opset_imports[DOMAIN] = 1
    _name_sizes(model, shapes or {})
    for node in model.graph.all_nodes():
        for key in _DROPPED_METADATA:
            node.metadata_props.pop(key, None)
    return model


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return names for the outputs of a program whose author gave none."""
    return [f"output{i}" if i else "output" for i in range(len(program.graph_signature.user_outputs))]


def _explain(error: Exception, program: torch.export.ExportedProgram) -> UnsupportedError:
    """Return EA0401 with the operator, the PyTorch module that calls it, its source line and how often it is used."""
    text = "\n".join(str(each) for each in _causes(error))
    named = _FAILED_NODE.search(text)
    # A decomposition drops the prefix of the operator it stands for: special_bessel_j0 becomes bessel_j0.
    node = next((each for each in program.graph.nodes if named and each.name.endswith(named[1])), None)
    if node is None:
        return UnsupportedError("EA0401", f"no lowering: {first_line(error)}")
    count = sum(each.target == node.target for each in program.graph.nodes)
    return UnsupportedError(
        "EA0401",
        f"no lowering for {str(node.target).removesuffix('.default')}",
        where=f"{_module_of(node)}{_line_of(node)}, used {count} {'time' if count == 1 else 'times'}",
        why="the ONNX exporter has no translation and no edgeattn op covers it",
        hints=["rewrite it in PyTorch, or register an op: edgeattn ops show single_head_attention is an example"],
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _module_of(node: torch.fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].removeprefix("L['self'].") or "the top module" if stack else "the top module"


def _line_of(node: torch.fx.Node) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" ({lines[-1][0]}:{lines[-1][1]})" if lines else ""


def _name_sizes(model: ir.Model, shapes: Shapes) -> None:
    """Replace torch's symbols (s77) by the names the user gave, in every shape of the graph."""
    names = {}
    for value in model.graph.inputs:
        for size, dim in zip(value.shape or (), shapes.get(value.name or "", ()), strict=False):
            if isinstance(size, ir.SymbolicDim) and isinstance(dim, Dim) and dim.name:
                names[str(size.value)] = dim.name
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    node_values = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in [*model.graph.inputs, *node_values]:
        if value.shape is not None:
            value.shape = ir.Shape([_rename(size, symbol, names) for size in value.shape])


def _rename(size: int | ir.SymbolicDim, symbol: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return symbol.sub(lambda match: names[match[0]], size.value)


@functools.cache
def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the exporter's table for all ops, registering each ONNX schema on the first call."""
    return {getattr(getattr(torch.ops, DOMAIN), op.name).default: _translation(op) for op in OPS}


def _translation(op: Op) -> Callable[..., Any]:
    register_schema(op)
    node = getattr(Opset(DOMAIN, 1), op.onnx_name)
    count = len(op.signature.inputs)

    def to_node(*arguments: Any) -> Any:
        attributes = dict(zip(op.signature.attributes, arguments[count:], strict=True))
        return node(*arguments[:count], **attributes)

    return to_node


def register_schema(op: Op) -> None:
    """Register the ONNX schema of `op`, with shape inference, once per process."""
    if defs.has(op.onnx_name, 1, DOMAIN):
        return
    formal = defs.OpSchema.FormalParameter
    schema = defs.OpSchema(
        op.onnx_name,
        DOMAIN,
        1,
        op.doc,
        inputs=[formal(tensor.name, _ONNX_TYPES[tensor.dtype]) for tensor in op.signature.inputs],
        outputs=[formal(tensor.name, _ONNX_TYPES[tensor.dtype]) for tensor in op.signature.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations")],
        attributes=[
            defs.OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind], "", required=True)
            for name, kind in op.signature.attributes.items()
        ],
    )
    schema.set_type_and_shape_inference_function(functools.partial(_infer, op))
    defs.register_schema(schema)


def _infer(op: Op, context: Any) -> None:
    """Set type and shape of every output from the signature; an unknown size stays unknown."""
    types = [context.get_input_type(position) for position in range(len(op.signature.inputs))]
    sizes: dict[str, int | str | None] = {}
    for tensor, kind in zip(op.signature.inputs, types, strict=True):
        for dim, size in zip(tensor.dims, kind.tensor_type.shape.dim, strict=False):
            value = size.dim_value if size.HasField("dim_value") else size.dim_param or None
            sizes[dim] = value if not isinstance(sizes.get(dim), int) else sizes[dim]
    integers = [name for name, kind in op.signature.attributes.items() if kind == "int"]
    sizes.update({name: context.get_attribute(name).i for name in integers})
    for position, output in enumerate(op.signature.outputs):
        context.set_output_type(position, _output_type(op, output, types, sizes))


def _output_type(
    op: Op, output: signature.Tensor, types: Sequence[Any], sizes: Mapping[str, int | str | None]
) -> TypeProto:
    result = TypeProto()
    typed = next((kind for tensor, kind in zip(op.signature.inputs, types, strict=True) if tensor.dtype == "T"), None)
    own = typed.tensor_type.elem_type if typed is not None else _ELEM_TYPES["float32"]
    result.tensor_type.elem_type = _ELEM_TYPES.get(output.dtype, own)
    for text in output.dims:
        size = signature.symbolic(text, sizes)
        dim = result.tensor_type.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = size
    return result
