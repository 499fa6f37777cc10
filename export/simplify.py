"""Simplification rules: several nodes that mean one standard operator become that operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, pattern

from edgeattn.export.fold import Check, single_use, values
from edgeattn.op import DOMAIN


class HardSigmoid(pattern.RewriteRuleClassBase):
    """clip(x + 3, 0, 6) / 6 -> HardSigmoid(alpha=1/6, beta=1/2), as squeeze-excite blocks write it."""

    def pattern(self, op: Any, x: Any, three: Any, low: Any, high: Any, six: Any) -> Any:
        return op.Div(op.Clip(op.Add(x, three), low, high), six)

    def check(self, context: Any, **inputs: ir.Value) -> Check:
        result = Check()
        wanted = (("three", 3.0), ("low", 0.0), ("high", 6.0), ("six", 6.0))
        found = [values(inputs[name]) for name, _ in wanted]
        if any(array is None or array.size != 1 or float(array.reshape(())) != number
               for array, (_, number) in zip(found, wanted, strict=True)):  # fmt: skip
            return result.fail("constants are not 3, 0, 6 and 6")
        return result

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.HardSigmoid(x, alpha=1.0 / 6.0, beta=0.5)


class GlobalPool(pattern.RewriteRuleClassBase):
    """ReduceMean over both spatial axes, kept -> GlobalAveragePool."""

    def pattern(self, op: Any, x: Any, axes: Any) -> Any:
        return op.ReduceMean(x, axes, _allow_other_attributes=True, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, axes: ir.Value, y: ir.Value) -> Check:
        result = Check()
        node, found = y.producer(), values(axes)
        assert node is not None
        if x.shape is None or len(x.shape) != 4 or found is None:
            return result.fail("not a map with constant axes")
        if sorted(int(axis) % 4 for axis in found.reshape(-1)) != [2, 3]:
            return result.fail("other axes")
        if node.attributes.get_int("keepdims", 1) != 1:
            return result.fail("the axes are dropped")
        return result

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.GlobalAveragePool(x)


class SingleHeadAttention(pattern.RewriteRuleClassBase):
    """v softmax(s q^T k)^T, channels first -> one EdgeSingleHeadAttention."""

    def pattern(self, op: Any, q: Any, k: Any, v: Any, s: Any) -> Any:
        rows = op.Transpose(q, perm=[0, 2, 1])
        logits = op.Mul(op.MatMul(rows, k), s)
        weights = op.Softmax(logits, axis=-1, _outputs=["weights"])
        return op.MatMul(v, op.Transpose(weights, perm=[0, 2, 1]))

    def check(self, context: Any, q: ir.Value, k: ir.Value, v: ir.Value, s: ir.Value, weights: ir.Value) -> Check:
        result = Check()
        scale = values(s)
        if scale is None or scale.size != 1:
            return result.fail("the scale is not one constant")
        if any(value.shape is None or len(value.shape) != 3 for value in (q, k, v)):
            return result.fail("not [batch, channels, tokens]")
        if not single_use(weights):
            return result.fail("the attention weights are used elsewhere")
        return result

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, s: ir.Value, **_: Any) -> Any:
        scale = float(np.asarray(values(s)).reshape(()))
        return op.EdgeSingleHeadAttention(q, k, v, scale=scale, _domain=DOMAIN, _version=1)


RULES: list[RewriteRule] = [HardSigmoid.rule(), GlobalPool.rule()]
CAPTURE_RULES: list[RewriteRule] = [SingleHeadAttention.rule()]
