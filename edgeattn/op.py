"""Op: one declaration per operator, from which every other form is derived.

A file in `kernels/` states the signature, the PyTorch reference, the ONNX body, the Triton kernel and the cases.
From it come the torch custom op with its fake and its gradient, the ONNX schema with shape inference, the translation
to one node, the function body linked into the exported file, the tests, and the line in `edgeattn ops list`.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgeattn import signature
from edgeattn.errors import UsageError
from edgeattn.registry import Registry

DOMAIN = "edgeattn"
OPS: Registry[Op] = Registry("op", "edgeattn.kernels")

Body = Callable[[Mapping[str, "int | None"], Mapping[str, Any], str], str]
Sample = Callable[[Mapping[str, int], Mapping[str, Any], torch.Generator], Mapping[str, torch.Tensor]]
_TORCH_ATTRIBUTE = {"int": "int", "float": "float", "ints": "int[]"}
_ONNX_TYPES = {"T": "T", "float32": "tensor(float)", "int32": "tensor(int32)"}
_ELEM_TYPES = {"float32": 1, "int32": 6}
_DTYPES = {"float32": torch.float32, "int32": torch.int32}
_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("edgeattn_plain", default=False)


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Run every op as its plain PyTorch reference, so that a tracer sees what the authors' code would show it."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and its launch, as expressions over dims, integer attributes and the constants.

    The function takes input pointers, int32 values, output pointers, then constants (`tl.constexpr`). An int32 value is
    the dim or integer attribute of that name; a constant is an entry of `constants` (a number, or a function of the
    dims, attributes and `itemsize`), else the attribute or dim of that name. `flops` counts what the result needs,
    a multiplication with its addition as two, as text over the same names as `grid`.
    """

    function: Callable[..., None]
    grid: str
    constants: Mapping[str, int | Callable[[Mapping[str, Any]], int]] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    flops: str = ""

    @property
    def constant_names(self) -> list[str]:
        """Return the parameters declared as `tl.constexpr`."""
        parameters = inspect.signature(self.function).parameters.values()
        return [parameter.name for parameter in parameters if "constexpr" in str(parameter.annotation)]


class Op:
    """One operator: `Op("haar_dwt", "(x[b c h w]) -> (s[b 4*c cdiv(h,2) cdiv(w,2)])")`."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.onnx_name = "Edge" + "".join(part.capitalize() for part in name.split("_"))
        self.text = text
        self.signature = signature.parse(text)
        self.triton: Kernel | None = None
        self.cases: Sequence[Mapping[str, Any]] = ()
        # Batch, map and token sizes may change from call to call; channels, heads and states are fixed by the weights.
        self.dynamic: Sequence[str] = ("b", "h", "w", "l", "n", "m")
        # Results that leave the range of float16 while the inputs are well inside: stays float32 in a float16 graph.
        self.wide = False
        # The body uses what TensorRT's parser refuses: engines need the plugin, and checks stop at the op's border.
        self.plugin_only = False
        self.ranges: Mapping[str, tuple[float, float]] = {}
        # Cases as models have them, for benchmarks and the resources of kernels; the tests of values run `cases`.
        self.shapes: Sequence[Mapping[str, Any]] = ()
        self.doc = ""
        self._reference: Callable[..., Any] | None = None
        self._fast: Callable[..., Any] | None = None
        self._body: Body | None = None
        self._sample: Sample | None = None
        self._specified: Callable[..., torch.Tensor] | None = None
        self.torch_op: Any = None
        OPS.add(name, self)

    def reference(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Take the slow, plain PyTorch function that defines the op, and define the torch custom op from it."""
        self._reference = function
        self.doc = (function.__doc__ or "").strip().split("\n")[0]
        self._define()
        return function

    def fast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Take a faster PyTorch form with the same result; it runs on the CPU in the reference's place."""
        self._fast = function
        return function

    def onnx(self, body: Body) -> Body:
        """Take the portable form: `body(dims, attributes, dtype)` returns ONNX function statements as text.

        A dim is an int, or None when dynamic; `dtype` is "float" or "float16"; attributes may be written as literals or
        by reference (`@scale`). Every float32 island (softmax, scan state) is the body's business.
        """
        self._body = body
        return body

    def sample(self, function: Sample) -> Sample:
        """Take `function(dims, attributes, generator)`: the inputs by name that random numbers do not make valid."""
        self._sample = function
        return function

    def specified(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Take `function(*inputs)`: which rows of the results are specified, [rows]; without it, all are."""
        self._specified = function
        return function

    def specified_rows(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return which rows of the results the op specifies for these inputs, or None when it is all of them."""
        return None if self._specified is None else self._specified(*inputs)

    def kernel(
        self,
        *,
        grid: str,
        num_warps: int = 4,
        num_stages: int = 3,
        flops: str = "",
        **constants: int | Callable[[Mapping[str, Any]], int],
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Take the Triton kernel with its launch; see `Kernel`."""

        def take(function: Callable[..., None]) -> Callable[..., None]:
            self.triton = Kernel(function, grid, constants, num_warps, num_stages, flops)
            return function

        return take

    def __call__(self, *tensors: torch.Tensor, **attributes: Any) -> Any:
        """Run the op: one tensor, or a tuple in the order of the signature. Raises EA0110 for a wrong argument."""
        missing = self.signature.attributes.keys() ^ attributes.keys()
        if missing:
            raise UsageError(
                "EA0110", f"{self.name}: attributes are {list(self.signature.attributes)}; check {sorted(missing)}"
            )
        self.signature.bind(self.name, [tensor.shape for tensor in tensors])
        if _plain.get():
            return self.call_reference(*tensors, **attributes)
        return self.torch_op(*tensors, **attributes)

    def call_reference(self, *tensors: torch.Tensor, **attributes: Any) -> Any:
        """Run the defining PyTorch function."""
        if self._reference is None:
            raise ValueError(f"{self.name}: no reference")
        return self._reference(*tensors, **attributes)

    def body(self, dims: Mapping[str, int | None], attributes: Mapping[str, Any], dtype: str) -> str:
        """Return the statements of the ONNX body for these dims, attributes and element type."""
        if self._body is None:
            raise ValueError(f"{self.name}: no ONNX body")
        return "\n".join(line.strip() for line in self._body(dims, attributes, dtype).strip().splitlines())

    def function(
        self, dims: Mapping[str, int | None], attributes: Mapping[str, Any], dtype: str, opset: int
    ) -> tuple[str, str]:
        """Return (name, text) of the ONNX function: the name carries a key of the body, so distinct bodies differ."""
        body = self.body(dims, attributes, dtype)
        name = f"{self.onnx_name}_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
        declared = f"<{', '.join(self.signature.attributes)}>" if self.signature.attributes else ""
        inputs = ", ".join(tensor.name for tensor in self.signature.inputs)
        outputs = ", ".join(tensor.name for tensor in self.signature.outputs)
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{name} {declared} ({inputs}) => ({outputs})'
        return name, f"{head} {{\n{body}\n}}"

    def split_case(self, case: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
        """Separate a case into dims and attributes."""
        attributes = {name: case[name] for name in self.signature.attributes}
        return {name: value for name, value in case.items() if name not in attributes}, attributes

    def example(self, case: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
        """Return inputs for `case`: from `sample`, else standard normal, or uniform in `ranges` (integers included)."""
        generator = torch.Generator().manual_seed(seed)
        dims, attributes = self.split_case(case)
        given = self._sample(dims, attributes, generator) if self._sample else {}
        tensors = []
        for tensor in self.signature.inputs:
            shape = [int(dim) if dim.isdigit() else dims[dim] for dim in tensor.dims]
            low, high = self.ranges.get(tensor.name, (0.0, 0.0))
            if tensor.name in given:
                value = given[tensor.name]
            elif low == high:
                value = torch.randn(shape, generator=generator, dtype=torch.float64)
            else:
                value = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
            tensors.append(value.to(_DTYPES.get(tensor.dtype, dtype)))
        return tensors

    def _run(self, *arguments: Any) -> Any:
        """Run on the CPU; outputs are contiguous, as the fake promises."""
        tensors, attributes = self._separate(arguments)
        found = (self._fast or self.call_reference)(*tensors, **attributes)
        return tuple(each.contiguous() for each in found) if isinstance(found, tuple) else found.contiguous()

    def _separate(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        count = len(self.signature.inputs)
        return arguments[:count], dict(zip(self.signature.attributes, arguments[count:], strict=True))

    def _fake(self, *arguments: Any) -> Any:
        tensors, attributes = self._separate(arguments)
        sizes = self.signature.bind(self.name, [tensor.shape for tensor in tensors])
        shapes = self.signature.output_shapes({**attributes, **sizes})
        outputs = [
            tensors[0].new_empty(shape, dtype=_DTYPES.get(output.dtype, self._type(tensors)))
            for shape, output in zip(shapes, self.signature.outputs, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _type(self, tensors: Sequence[torch.Tensor]) -> torch.dtype:
        """Return what T stands for in this call."""
        typed = zip(tensors, self.signature.inputs, strict=True)
        found: torch.dtype = next((tensor.dtype for tensor, formal in typed if formal.dtype == "T"), torch.float32)
        return found

    def _define(self) -> None:
        tensors = [f"Tensor {tensor.name}" for tensor in self.signature.inputs]
        attributes = [f"{_TORCH_ATTRIBUTE[kind]} {name}" for name, kind in self.signature.attributes.items()]
        results = ["Tensor"] * len(self.signature.outputs)
        schema = f"({', '.join(tensors + attributes)}) -> ({', '.join(results)})"
        define = torch.library.custom_op(f"{DOMAIN}::{self.name}", self._run, mutates_args=(), schema=schema)
        define.register_fake(self._fake)
        if all(output.dtype == "T" for output in self.signature.outputs):
            define.register_autograd(self._backward, setup_context=self._save)
        self.torch_op = define

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        tensors, ctx.attributes = self._separate(inputs)
        ctx.save_for_backward(*tensors)

    def _backward(self, ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Differentiate the reference: correct for every op, and speed is not what training here is for."""
        tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = self.call_reference(*tensors, **ctx.attributes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (*[next(found) if tensor.requires_grad else None for tensor in tensors], *[None] * len(ctx.attributes))


def constant(name: str, values: Any, dtype: str = "int64") -> str:
    """Return the body statement that defines a constant tensor: `constant("index", [[0, 1], [2, 3]])`.

    ONNX text has no float16 literals: such a constant is written as float32 and cast, which every runtime folds.
    """
    if dtype == "float16":
        return f"{constant(f'{name}_wide', values, 'float')}\n{name} = Cast<to = 10>({name}_wide)"
    array = np.asarray(values)
    numbers = ", ".join(repr(value) for value in array.reshape(-1).tolist())
    shape = "" if array.ndim == 0 else f"[{','.join(map(str, array.shape))}]"
    return f"{name} = Constant<value = {dtype}{shape} {{{numbers}}}>()"
