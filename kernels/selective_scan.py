"""Selective scan (Mamba, MobileMamba, Vim): a linear recurrence per channel, summed over scan directions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    step = step + delta_bias.unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step.unsqueeze(-1) * A.unsqueeze(-2))  # [b, k, d, l, s]
    drive = (step * x).unsqueeze(-1) * enter.transpose(2, 3).unsqueeze(2)  # [b, k, d, l, s]
    state = torch.zeros_like(drive[..., 0, :])
    outputs = []
    for t in range(drive.shape[3]):
        state = decay[..., t, :] * state + drive[..., t, :]
        outputs.append((state * leave[..., t].unsqueeze(2)).sum(-1))
    y = torch.stack(outputs, -1) + Dskip.unsqueeze(-1) * x  # [b, k, d, l]
    return _merged(y, directions).to(u.dtype)


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
    y = torch.einsum("lbkds,lbks->lbkd", state, leave) + Dskip * x
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
    x = x.to(torch.promote_types(x.dtype, torch.float32)).expand(-1, len(directions), -1, -1)
    return torch.stack([x[:, k].flip(-1) if way else x[:, k] for k, way in enumerate(directions)], 1)


def _merged(y: Tensor, directions: list[int]) -> Tensor:
    """Return the sum over directions of y [b, k, d, l], each put back in natural order."""
    return torch.stack([y[:, k].flip(-1) if way else y[:, k] for k, way in enumerate(directions)]).sum(0)


op.cases = [
    dict(b=2, j=1, k=2, d=12, s=1, l=49, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=2, d=16, s=1, l=144, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=2, k=2, d=5, s=1, l=7, directions=[1, 0], delta_softplus=0),
    dict(b=2, j=1, k=1, d=6, s=1, l=1, directions=[0], delta_softplus=1),
    dict(b=2, j=2, k=2, d=6, s=4, l=13, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=4, d=5, s=3, l=10, directions=[0, 1, 0, 1], delta_softplus=0),
]
op.ranges = {"A": (-3.0, -0.1)}
