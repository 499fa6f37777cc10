"""Folding rules: norms, scales and residual branches around convolutions and linear layers become weights.

Every product is computed in float64 and rounded once. The exporter folds a batch norm *after* a convolution; these
rules cover what it leaves: a norm ahead of a linear layer, per-channel scales, and x + depthwise(x).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, pattern

Array = npt.NDArray[Any]
Check = pattern.MatchResult


def values(value: ir.Value | None) -> Array | None:
    """Return the constant behind `value` as an array, or None when it is computed at run time."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def single_use(*results: ir.Value) -> bool:
    """Return whether each value feeds exactly one node and is no graph output."""
    return all(len(result.uses()) == 1 and not result.is_graph_output() for result in results)


def _initializer(op: Any, array: Array, like: Array, name: str | None) -> Any:
    return op.initializer(ir.tensor(array.astype(like.dtype), name=name))


class NormBeforeLinear(pattern.RewriteRuleClassBase):
    """BatchNormalization(x) -> Gemm(x, w, b, transB=1): the norm becomes part of w and b."""

    def pattern(self, op: Any, x: Any, gain: Any, shift: Any, mean: Any, var: Any, w: Any, b: Any) -> Any:
        normed = op.BatchNormalization(x, gain, shift, mean, var, _allow_other_attributes=True, _outputs=["normed"])
        return op.Gemm(normed, w, b, _allow_other_attributes=True, _outputs=["y"])

    def check(self, context: Any, normed: ir.Value, y: ir.Value, **inputs: ir.Value) -> Check:
        result = Check()
        gemm, norm = y.producer(), normed.producer()
        assert gemm is not None
        assert norm is not None
        if not single_use(normed):
            return result.fail("the normalised value is used elsewhere")
        if any(values(inputs[name]) is None for name in ("gain", "shift", "mean", "var", "w", "b")):
            return result.fail("a parameter is computed at run time")
        if gemm.attributes.get_int("transB", 0) != 1 or gemm.attributes.get_int("transA", 0) != 0:
            return result.fail("Gemm is not x w^T")
        if norm.attributes.get_int("training_mode", 0):
            return result.fail("training mode")
        return result

    def rewrite(self, op: Any, x: ir.Value, normed: ir.Value, y: ir.Value, **inputs: ir.Value) -> Any:
        norm, gemm = normed.producer(), y.producer()
        assert norm is not None
        assert gemm is not None
        parts = {name: np.asarray(values(inputs[name])) for name in ("gain", "shift", "mean", "var", "w", "b")}
        wide = {name: part.astype(np.float64) for name, part in parts.items()}
        scale = wide["gain"] / np.sqrt(wide["var"] + norm.attributes.get_float("epsilon", 1e-5))
        bias = wide["b"] + wide["w"] @ (wide["shift"] - wide["mean"] * scale)
        weight = _initializer(op, wide["w"] * scale, parts["w"], inputs["w"].name)
        return op.Gemm(x, weight, _initializer(op, bias, parts["b"], inputs["b"].name), **gemm.attributes)


class ScaleAfterConv(pattern.RewriteRuleClassBase):
    """Conv(x, w, b) * s, with s one number or one per output channel: the scale becomes part of w and b."""

    def pattern(self, op: Any, x: Any, w: Any, s: Any) -> Any:
        conv = op.Conv(x, w, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["conv"])
        return op.Mul(conv, s)

    def check(self, context: Any, conv: ir.Value, w: ir.Value, s: ir.Value, **_: Any) -> Check:
        result = Check()
        weight, scale, node = values(w), values(s), conv.producer()
        assert node is not None
        if weight is None or scale is None or (len(node.inputs) > 2 and values(node.inputs[2]) is None):
            return result.fail("a factor is computed at run time")
        if not single_use(conv):
            return result.fail("the convolution is used elsewhere")
        if not _per_channel(scale, weight.shape[0], weight.ndim):
            return result.fail("the factor varies over space or batch")
        return result

    def rewrite(self, op: Any, x: ir.Value, conv: ir.Value, w: ir.Value, s: ir.Value) -> Any:
        node = conv.producer()
        assert node is not None
        weight, factor = np.asarray(values(w)), np.asarray(values(s), np.float64)
        scale = np.broadcast_to(factor.reshape(-1), weight.shape[0])
        shape = (-1,) + (1,) * (weight.ndim - 1)
        scaled = [_initializer(op, weight * scale.reshape(shape), weight, w.name)]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = np.asarray(values(node.inputs[2]))
            scaled.append(_initializer(op, bias * scale, bias, node.inputs[2].name))
        return op.Conv(x, *scaled, **node.attributes)


class ResidualDepthwise(pattern.RewriteRuleClassBase):
    """x + Conv(x, w), depthwise, stride 1 and size-preserving: one is added to the centre tap of every filter."""

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        conv = op.Conv(x, w, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["conv"])
        return op.Add(x, conv)

    def check(self, context: Any, x: ir.Value, conv: ir.Value, w: ir.Value) -> Check:
        result = Check()
        node, weight = conv.producer(), values(w)
        assert node is not None
        if weight is None or weight.ndim != 4 or weight.shape[1] != 1:
            return result.fail("not a depthwise convolution with constant weights")
        if node.attributes.get_int("group", 1) != weight.shape[0]:
            return result.fail("more than one filter per channel")
        if not single_use(conv):
            return result.fail("the convolution is used elsewhere")
        if not _keeps_size(node, weight.shape[2:]):
            return result.fail("stride, dilation or padding moves the centre tap")
        return result

    def rewrite(self, op: Any, x: ir.Value, conv: ir.Value, w: ir.Value) -> Any:
        node, weight = conv.producer(), np.asarray(values(w))
        assert node is not None
        merged = weight.astype(np.float64)
        merged[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1.0
        rest = [value for value in node.inputs[2:] if value is not None]
        return op.Conv(x, _initializer(op, merged, weight, w.name), *rest, **node.attributes)


def _per_channel(scale: Array, channels: int, rank: int) -> bool:
    if scale.size == 1:
        return scale.ndim <= rank
    shape = (1,) * (rank - scale.ndim) + scale.shape
    return len(shape) == rank and shape == (1, channels) + (1,) * (rank - 2)


def _keeps_size(node: ir.Node, kernel: tuple[int, ...]) -> bool:
    ones = all(list(node.attributes.get_ints(name, [1, 1])) == [1, 1] for name in ("strides", "dilations"))
    half = [size // 2 for size in kernel]
    odd = all(size % 2 for size in kernel)
    padded = list(node.attributes.get_ints("pads", [0, 0, 0, 0])) == [*half, *half]
    return ones and odd and padded and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


NORM_RULES: list[RewriteRule] = [NormBeforeLinear.rule()]
SCALE_RULES: list[RewriteRule] = [ScaleAfterConv.rule()]
RESIDUAL_RULES: list[RewriteRule] = [ResidualDepthwise.rule()]
