"""The selective scan in ONNX operators: a specialised form for static sizes and state size 1, and a generic one."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.kernels._recurrence import recurrence
from edgeattn.kernels._statements import Statements

_FLOAT = 1
# softplus(z) = max(z, 0) + log1p(1 / u), u = exp(|z|). With t = u + 1/2 the second part is 2 artanh(1 / 2t), fitted as
# t (t^2 - a) / ((t^2 - b) (t^2 - c)) to 1e-8 of itself for every u >= 1: relative accuracy, which log(1 + .) has not.
_SOFTPLUS_FIT = (0.13463995851109495, 0.18777801, 0.03019572)
_SOFTPLUS_RANGE = 21.0  # keeps t^4 finite; below -21 the result stays at 8e-10


def static_body(dims: Mapping[str, Any], attributes: Mapping[str, Any], dtype: str) -> str:
    """Return the body for state size 1 and known k, d and l: layout [b, k, l, d] throughout."""
    body = Statements()
    u, delta, enter, leave = (_float(body, name, dtype) for name in ("u", "delta", "Bm", "Cm"))
    x, step, enter, leave = (body.add("Transpose", value, perm=[0, 1, 3, 2]) for value in (u, delta, enter, leave))
    step = body.add("Add", step, body.add("Unsqueeze", "delta_bias", body.const([1])))
    step = _softplus(body, step) if attributes["delta_softplus"] else step
    log_decay = body.add("Mul", step, body.add("Transpose", "A", perm=[0, 2, 1]))
    drive = body.add("Mul", body.add("Mul", x, enter), step)
    states = recurrence(body, log_decay, drive, attributes["directions"], dims["l"], dims["d"])
    read = body.add("Mul", states, leave)
    _finish(body, read, x, dims, dtype, axis=1)
    return str(body)


def generic_body(dims: Mapping[str, Any], attributes: Mapping[str, Any], dtype: str) -> str:
    """Return the body for any sizes: one ONNX Scan over the tokens, layout [l, b, k, d, s]."""
    body, directions = Statements(), attributes["directions"]
    u, delta, enter, leave = (_float(body, name, dtype) for name in ("u", "delta", "Bm", "Cm"))
    x, step, enter, leave = (body.add("Transpose", value, perm=[3, 0, 1, 2]) for value in (u, delta, enter, leave))
    step = body.add("Add", step, "delta_bias")  # [l, b, k, d]
    step = _softplus(body, step) if attributes["delta_softplus"] else step
    last, before = body.const([-1]), body.const([3])
    decay = body.add("Exp", body.add("Mul", body.add("Unsqueeze", step, last), "A"))
    drive = body.add("Unsqueeze", body.add("Mul", x, step), last)
    enter, leave = (body.add("Unsqueeze", value, before) for value in (enter, leave))  # [l, b, k, 1, s]
    drive = body.add("Mul", drive, enter)
    back = _backwards(body, drive) if any(directions) else ""
    visited = [_reordered(body, value, back, directions) for value in (decay, drive, leave)]
    start = body.add("ConstantOfShape", body.add("Shape", drive, start=1))
    body.scan(_STEP, ["final", "visited_y"], [start, *visited])
    _finish(body, _reordered(body, "visited_y", back, directions), x, dims, dtype, axis=2)
    return str(body)


_STEP = """
    step (float[b, k, d, s] h, float[b, k, d, s] a, float[b, k, d, s] x, float[b, k, one, s] c)
        => (float[b, k, d, s] next, float[b, k, d] y) {
        kept = Mul(a, h)
        next = Add(kept, x)
        read = Mul(next, c)
        axis = Constant<value_ints = [-1]>()
        y = ReduceSum<keepdims = 0>(read, axis)
    }
"""


def _finish(body: Statements, read: str, x: str, dims: Mapping[str, Any], dtype: str, axis: int) -> None:
    """Append y = the sum over directions, `axis`, of the states read out and the skips, in the layout of the op."""
    k = dims["k"]
    gain = body.add("Unsqueeze", "Dskip", body.const([1])) if axis == 1 else "Dskip"
    if dims["j"] == 1 and k > 1:
        gain = body.add("ReduceSum", gain, body.const([0]), keepdims=int(axis == 1))
        parts = [*body.split(read, axis, k), body.add("Mul", x, gain)]
    else:
        parts = body.split(body.add("Add", read, body.add("Mul", x, gain)), axis, k)
    # One Sum rather than Adds: ONNX Runtime would merge an Add with the norm that follows into something slower.
    total = body.add("Sum", *parts) if len(parts) > 1 else parts[0]
    natural = [0, 2, 1] if axis == 1 else [1, 2, 0]
    total = body.add("Squeeze", total, body.const([axis]))
    if dtype == "float":
        body.add("Transpose", total, perm=natural, out="y")
    else:
        body.add("CastLike", body.add("Transpose", total, perm=natural), "u", out="y")


def _float(body: Statements, name: str, dtype: str) -> str:
    """Return the input in float32: the state and what decays it stay in single precision."""
    return name if dtype == "float" else body.add("Cast", name, to=_FLOAT)


def _backwards(body: Statements, value: str) -> str:
    """Append the indices l - 1 ... 0 of the first axis of `value`."""
    # Not Range(l - 1, -1, -1): ONNX Runtime 1.31 turns a Gather by such a Range into a Slice that ends too early.
    length = body.add("Squeeze", body.add("Shape", value, start=0, end=1))
    zero, one = body.const(0), body.const(1)
    return body.add("Sub", body.add("Sub", length, one), body.add("Range", zero, length, one))


def _reordered(body: Statements, value: str, back: str, directions: Sequence[int]) -> str:
    """Append the reversal along the first axis of those slices of axis 2 whose direction is 1."""
    if not any(directions):
        return value
    parts = body.split(value, 2, len(directions))
    turned = [
        body.add("Gather", part, back, axis=0) if way else part for part, way in zip(parts, directions, strict=True)
    ]
    return body.add("Concat", *turned, axis=2) if len(turned) > 1 else turned[0]


def _softplus(body: Statements, z: str) -> str:
    """Append softplus: the operator of that name costs sixty times an Exp in ONNX Runtime."""
    near = body.add("Clip", z, body.const(-_SOFTPLUS_RANGE, "float"), body.const(_SOFTPLUS_RANGE, "float"))
    t = body.add("Add", body.add("Exp", body.add("Abs", near)), body.const(0.5, "float"))
    square = body.add("Mul", t, t)
    a, b, c = (body.add("Sub", square, body.const(value, "float")) for value in _SOFTPLUS_FIT)
    tail = body.add("Div", body.add("Mul", t, a), body.add("Mul", b, c))
    return body.add("Add", body.add("Relu", z), tail)
