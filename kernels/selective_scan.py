"""Selective scan (Mamba, MobileMamba, Vim): a linear recurrence per channel, summed over scan directions."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._recurrence import chunk_of, two_level
from edgeattn.kernels._statements import Statements
from edgeattn.op import Op

op = Op(
    "selective_scan",
    "(u[b j d l], delta[b k d l], A: float32[k d s], Bm[b k s l], Cm[b k s l], Dskip: float32[k d],"
    " delta_bias: float32[k d], *, directions: ints, delta_softplus: int) -> (y[b d l])",
)  # j = 1 (one input for all directions) or k; every input is in natural order


@op.reference
def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    Dskip: Tensor,
    delta_bias: Tensor,
    *,
    directions: list[int],
    delta_softplus: int,
) -> Tensor:
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t, y_t = <C_t, h_t> + D u_t per direction, then their sum (Mamba, eq. 2).

    Direction 0 visits the positions forwards, 1 backwards; dt = delta + bias, through softplus if asked. The state is
    float32 at least.
    """
    x, step, enter, leave = (_visited(tensor, directions) for tensor in (u, delta, Bm, Cm))
    step = (step + delta_bias.unsqueeze(-1)).flatten(1, 2)  # [b, c, l], c over directions and channels
    step = F.softplus(step) if delta_softplus else step
    x = x.flatten(1, 2)
    enter, leave = (code.repeat_interleave(delta.shape[2], 1) for code in (enter, leave))  # [b, c, s, l]
    decay = torch.exp(torch.einsum("bcl,cs->bcls", step, A.flatten(0, 1)))
    drive = torch.einsum("bcl,bcsl,bcl->bcls", step, enter, x)
    state = torch.zeros_like(drive[:, :, 0])
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bcs,bcs->bc", state, leave[..., t]))
    y = torch.stack(outputs, -1) + Dskip.flatten().unsqueeze(-1) * x
    return _merged(y.unflatten(1, delta.shape[1:3]), directions).to(u.dtype)


@op.fast
def fast(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    Dskip: Tensor,
    delta_bias: Tensor,
    *,
    directions: list[int],
    delta_softplus: int,
) -> Tensor:
    """Run the recurrence in about sqrt(l) steps over chunks, then over their totals."""
    x, step, enter, leave = (_visited(tensor, directions).movedim(3, 0) for tensor in (u, delta, Bm, Cm))
    step = step + delta_bias  # [l, b, k, d]
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step.unsqueeze(-1) * A)  # [l, b, k, d, s]
    drive = (step * x).unsqueeze(-1) * enter.unsqueeze(3)
    state = _recurrence(decay, drive)
    y = (state * leave.unsqueeze(3)).sum(-1) + Dskip * x
    return _merged(y.movedim(0, 3), directions).to(u.dtype)


def _recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Return every state of `h_t = decay_t h_(t-1) + drive_t` along the first axis; overwrites both arguments."""
    length = drive.shape[0]
    chunk = math.isqrt(length - 1) + 1
    padding = (0, 0) * (drive.ndim - 1) + (0, -length % chunk)
    decay = F.pad(decay, padding).unflatten(0, (-1, chunk))  # padded positions come last and are dropped
    drive = F.pad(drive, padding).unflatten(0, (-1, chunk))
    for t in range(1, chunk):  # states from zero, and products of decays, inside every chunk at once
        drive[:, t].addcmul_(decay[:, t], drive[:, t - 1])
        decay[:, t].mul_(decay[:, t - 1])
    for n in range(1, drive.shape[0]):  # the last state of every chunk
        drive[n, -1].addcmul_(decay[n, -1], drive[n - 1, -1])
    drive[1:, :-1].addcmul_(decay[1:, :-1], drive[:-1, -1:])
    return drive.flatten(0, 1)[:length]


def _visited(x: Tensor, directions: list[int]) -> Tensor:
    """Return x [b, k or 1, ..., l] in visiting order per direction, [b, k, ..., l], float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = x.split(1, 1) if x.shape[1] > 1 else [x] * len(directions)
    return torch.cat([part.flip(-1) if way else part for part, way in zip(parts, directions, strict=True)], 1)


def _merged(y: Tensor, directions: list[int]) -> Tensor:
    """Return the sum over directions of y [b, k, d, l], each put back in natural order."""
    parts = zip(y.unbind(1), directions, strict=True)
    return functools.reduce(torch.add, [part.flip(-1) if way else part for part, way in parts])


op.cases = [
    dict(b=2, j=1, k=2, d=12, s=1, l=49, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=2, d=16, s=1, l=144, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=2, k=2, d=5, s=1, l=7, directions=[1, 0], delta_softplus=0),
    dict(b=2, j=1, k=1, d=6, s=1, l=1, directions=[0], delta_softplus=1),
    dict(b=2, j=2, k=2, d=6, s=4, l=13, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=4, d=5, s=3, l=10, directions=[0, 1, 0, 1], delta_softplus=0),
]
op.wide = True  # a sum of products of three inputs
op.ranges = {
    "A": (-3.0, -0.1),
    "delta": (0.5, 1.5),
    "delta_bias": (-0.5, 0.5),
}  # without softplus a negative step lets the state grow


@op.onnx
def body(dims, attributes, dtype):
    if dims["l"] is not None and dims["s"] == 1 and dims["j"] == 1:
        return str(_static(dims, attributes, dtype))
    return _generic(dims, attributes, dtype)


def _generic(dims, attributes, dtype):
    """Any length, batch and state size: one ONNX Scan per direction, which walks backwards where the direction does.

    What does not depend on the state (decays and drives, time-major [l, b, d, s]) is computed for all steps at once.
    """
    k, inputs = dims["k"], dims["j"]
    body = Statements()
    step = body.add("Add", _single(body, "delta", dtype), body.add("Unsqueeze", "delta_bias", body.const([2])))
    step = _softplus(body, step) if attributes["delta_softplus"] else step
    steps, rates, skips = body.split(step, 1, k), body.split("A", 0, k), body.split("Dskip", 0, k)
    enters, leaves = (body.split(_single(body, name, dtype), 1, k) for name in ("Bm", "Cm"))
    tokens = body.split(_single(body, "u", dtype), 1, inputs)
    parts = []
    for way, direction in enumerate(attributes["directions"]):
        dt, x = (body.add("Transpose", value, perm=[3, 0, 2, 1]) for value in (steps[way], tokens[way % inputs]))
        enter, leave = (body.add("Transpose", value, perm=[3, 0, 1, 2]) for value in (enters[way], leaves[way]))
        rate = body.add("Squeeze", rates[way], body.const([0]))  # [d, s]
        decay = body.add("Exp", body.add("Mul", dt, rate))
        drive = body.add("Mul", body.add("Mul", dt, x), enter)
        states = _scan(body, decay, drive, direction)
        y = body.add("ReduceSum", body.add("Mul", states, leave), body.const([3]), keepdims=1)
        skip = body.add("Mul", x, body.add("Transpose", skips[way], perm=[1, 0]))
        parts.append(body.add("Add", y, skip))
    total = body.add("Squeeze", body.add("Sum", *parts), body.const([3]))  # [l, b, d]
    _finish(body, body.add("Transpose", total, perm=[1, 2, 0]), dtype)
    return str(body)


def _scan(body, decay, drive, direction):
    """Append `h_t = decay_t h_(t-1) + drive_t` along the first axis; return all states in natural order."""
    start = body.add("ConstantOfShape", body.add("Shape", drive, start=1))
    values = [f"float[scan_b, scan_d, scan_s] {name}" for name in ("held", "kept", "added", "next", "state")]
    step = "{ faded = Mul(kept, held) next = Add(faded, added) state = Identity(next) }"
    graph = f"step ({', '.join(values[:3])}) => ({', '.join(values[3:])}) {step}"
    ways = f"scan_input_directions = [{direction}, {direction}], scan_output_directions = [{direction}]"
    return body.scan(f"num_scan_inputs = 2, {ways}, body = {graph}", start, decay, drive)


def _finish(body, value, dtype):
    body.add("Identity" if dtype == "float" else "CastLike", *([value] if dtype == "float" else [value, "u"]), out="y")


def _static(dims, attributes, dtype):
    """State size 1, static length: layout [b, k, chunks, steps, d], every direction in visiting order."""
    k, d, length = dims["k"], dims["d"], dims["l"]
    steps = chunk_of(length)
    chunks = -(-length // steps)
    body = Statements()
    visits = _visits(attributes["directions"], length, chunks * steps)
    shared = [_rows(order, steps) for order in visits]
    own = [_rows([place + length * way for place in order], steps) for way, order in enumerate(visits)]
    # delta
    step = body.add("Transpose", _single(body, "delta", dtype), perm=[0, 1, 3, 2])
    step = body.add("Add", step, body.add("Unsqueeze", "delta_bias", body.const([1])))
    step = body.add("Gather", body.add("Reshape", step, body.const([0, k * length, d])), body.const(own), axis=1)
    if attributes["delta_softplus"]:
        step = _softplus(body, step)
    tokens = body.add("Transpose", body.add("Squeeze", _single(body, "u", dtype), body.const([1])), perm=[0, 2, 1])
    x = body.add("Gather", tokens, body.const(shared), axis=1)
    column = [[[[p] for p in row] for row in rows] for rows in own]
    enter, leave = (
        body.add("Gather", body.add("Reshape", value, body.const([0, k * length])), body.const(column), axis=1)
        for value in (_single(body, "Bm", dtype), _single(body, "Cm", dtype))
    )
    rate = body.add("Unsqueeze", body.add("Transpose", "A", perm=[0, 2, 1]), body.const([1]))
    log_decay = body.add("Mul", step, rate)
    decay = body.add("Exp", log_decay)
    drive = body.add("Mul", body.add("Mul", x, enter), step)
    states = two_level(body, log_decay, decay, drive, chunks, steps)
    y = body.add("Reshape", body.add("Mul", states, leave), body.const([0, k * chunks * steps, d]))
    parts = []
    for way, order in enumerate(visits):
        where = [0] * length
        for t, place in enumerate(order[:length]):
            where[place] = t + way * chunks * steps
        parts.append(body.add("Gather", y, body.const(where), axis=1))
    skip = body.add("Mul", tokens, body.add("ReduceSum", "Dskip", body.const([0]), keepdims=0))
    total = body.add("Sum", *parts, skip)
    if dtype == "float":
        body.add("Transpose", total, perm=[0, 2, 1], out="y")
    else:
        body.add("CastLike", body.add("Transpose", total, perm=[0, 2, 1]), "u", out="y")
    return body


def _single(body, name, dtype):
    return name if dtype == "float" else body.add("Cast", name, to=1)


def _visits(directions, length, padded):
    """Return the place visited at every step per direction; steps beyond the length revisit the last place."""
    orders = [range(length - 1, -1, -1) if way else range(length) for way in directions]
    return [[*order, *[order[-1]] * (padded - length)] for order in orders]


def _rows(order, steps):
    return [order[start : start + steps] for start in range(0, len(order), steps)]


# softplus(z) = max(z, 0) + log1p(1 / u), u = exp(|z|). With t = u + 1/2 the second part is 2 artanh(1 / 2t), fitted as
# t (t^2 - a) / ((t^2 - b) (t^2 - c)) to 1e-8 of itself for every u >= 1: relative accuracy, which log(1 + .) has not.
_SOFTPLUS = (0.13463995851109495, 0.18777801, 0.03019572)
_SOFTPLUS_RANGE = 21.0  # keeps t^4 finite; below -21 the result stays at 8e-10


def _softplus(body, z):
    """Append softplus: the operator of that name costs sixty times an Exp in ONNX Runtime."""
    near = body.add("Clip", z, body.const(-_SOFTPLUS_RANGE, "float"), body.const(_SOFTPLUS_RANGE, "float"))
    t = body.add("Add", body.add("Exp", body.add("Abs", near)), body.const(0.5, "float"))
    square = body.add("Mul", t, t)
    a, b, c = (body.add("Sub", square, body.const(value, "float")) for value in _SOFTPLUS)
    tail = body.add("Div", body.add("Mul", t, a), body.add("Mul", b, c))
    return body.add("Add", body.add("Relu", z), tail)
