"""Selective scan (Mamba, MobileMamba, Vim): a linear recurrence per channel, summed over scan directions."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._scan_body import generic_body, static_body
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


@op.onnx
def body(dims, attributes, dtype):
    static = dims["s"] == 1 and None not in (dims["k"], dims["d"], dims["l"])
    return (static_body if static else generic_body)(dims, attributes, dtype)


op.cases = [
    dict(b=2, j=1, k=2, d=12, s=1, l=49, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=2, d=16, s=1, l=144, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=2, k=2, d=5, s=1, l=7, directions=[1, 0], delta_softplus=0),
    dict(b=1, j=1, k=2, d=6, s=1, l=9, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=3, d=4, s=1, l=11, directions=[0, 1, 1], delta_softplus=1),
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
