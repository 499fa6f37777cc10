"""Selective scan (Mamba, MobileMamba, Vim): a linear recurrence per channel, summed over scan directions."""

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
    x, step, drive, read = (_visited(tensor, directions) for tensor in (u, delta, Bm, Cm))
    step = step + delta_bias.unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step.unsqueeze(-1) * A.unsqueeze(-2))  # [b, k, d, l, s]
    drive = (step * x).unsqueeze(-1) * drive.transpose(2, 3).unsqueeze(2)  # [b, k, d, l, s]
    state = torch.zeros_like(drive[..., 0, :])
    outputs = []
    for t in range(drive.shape[3]):
        state = decay[..., t, :] * state + drive[..., t, :]
        outputs.append((state * read[..., t].unsqueeze(2)).sum(-1))
    y = torch.stack(outputs, -1) + Dskip.unsqueeze(-1) * x  # [b, k, d, l]
    return _natural(y, directions).sum(1).to(u.dtype)
