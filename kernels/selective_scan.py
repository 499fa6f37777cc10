"""Selective scan (Mamba, MobileMamba, Vim): a linear recurrence per channel, summed over scan directions."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._scan_body import generic_body, static_body
from edgeattn.kernels._scan_kernel import load_tokens, retreat, visit
from edgeattn.kernels._triton import block, tl
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


def _tokens(dims):
    """Return the tokens of a tile: all of them up to 1024. Any other length works too, in tiles of this many."""
    return min(block(dims["l"] or 1024), 1024)


def _channels(dims):
    """Return the channels of a tile: 512 elements together, four for each lane."""
    return max(1, 512 // _tokens(dims))


def _states(dims):
    """Return the width of a table of the states of a channel."""
    return block(dims["k"] * dims["s"], 1)


@op.kernel(
    grid="b*cdiv(d, C)",
    flops="b*k*d*l*(7*s + 3)",
    C=_channels,
    BL=_tokens,
    T=lambda dims: max(1, min(256 // (_channels(dims) * _states(dims)), 8)),  # two registers
    W=_states,
    WAYS=lambda dims: sum(way << place for place, way in enumerate(dims["directions"])),
)
def kernel(
    u,
    delta,
    A,
    Bm,
    Cm,
    Dskip,
    delta_bias,
    d,
    l,  # noqa: E741 - a kernel takes a dim by its name in the signature
    y,
    j: tl.constexpr,
    k: tl.constexpr,
    s: tl.constexpr,
    delta_softplus: tl.constexpr,
    WAYS: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
):
    """One program takes C channels of one item in every direction, BL tokens at a time, and writes their sum once.

    Threads lie along the tokens, in a parallel scan: loads are coalesced and one image fills a board. A thread for each
    channel would give 7 to 17 warps, waiting in 2 l dependent steps on loads that are l elements apart. Inputs of every
    direction are in natural order, hence so are the results, which add up in registers.

    Over several tiles forward states are carried. A sweep from the right keeps, in registers, the backward states that
    enter the last tile of each of T spans; where a span has several tiles (l > T BL), those inside are found again.
    """
    groups = tl.cdiv(d, C)
    first = (tl.program_id(0) % groups) * C
    own = first + tl.arange(0, C)
    channels = tl.minimum(own, d - 1)  # those past the end repeat the last one, and are not stored
    lanes = tl.minimum(first + tl.arange(0, C * BL // 4) // (BL // 4), d - 1)  # the same for every lane
    item = (tl.program_id(0) // groups).to(tl.int64)  # large batches of long sequences pass 2^31 elements
    tensors = (delta, A, Bm, Cm, Dskip, delta_bias)
    place = (item, channels, lanes, d, l)
    tiles = tl.cdiv(l, BL)
    span = tl.cdiv(tiles, T)
    spans = tl.arange(0, T)[None, :, None]
    backward = ((WAYS >> (tl.arange(0, W) // s)) & 1)[None, :] == 1
    running = tl.zeros([C, W], tl.float32)
    ends = tl.zeros([C, T, W], tl.float32)
    for tile in range(tiles - 1, 0, -1):
        running = retreat(u, tensors, place, tile * BL, running, WAYS, j, k, s, delta_softplus, BL)
        ends = tl.where((spans == tile // span - 1) & (tile % span == 0), running[:, None, :], ends)
    for tile in range(tiles):
        end = tl.minimum((tile // span + 1) * span, tiles) - 1
        running = tl.where(backward, tl.sum(tl.where(spans == tile // span, ends, 0.0), 1), running)
        for other in range(end, tile, -1):
            running = retreat(u, tensors, place, other * BL, running, WAYS, j, k, s, delta_softplus, BL)
        total = tl.zeros([C, BL], tl.float32)
        for way in tl.static_range(k):
            if way < j:
                x = load_tokens(u + ((item * j + way) * d + lanes) * l, tile * BL, l, C, BL)
            part, running = visit(x, tensors, place, tile * BL, running, way, WAYS, k, s, delta_softplus)
            total += part
        tokens = tile * BL + tl.arange(0, BL)[None, :]
        rows = y + (item * d + own) * l
        tl.store(rows[:, None] + tokens, total.to(y.dtype.element_ty), mask=(own < d)[:, None] & (tokens < l))


op.cases = [
    dict(b=2, j=1, k=2, d=12, s=1, l=49, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=2, d=16, s=1, l=144, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=2, k=2, d=5, s=1, l=7, directions=[1, 0], delta_softplus=0),
    dict(b=1, j=1, k=2, d=6, s=1, l=9, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=3, d=4, s=1, l=11, directions=[0, 1, 1], delta_softplus=1),
    dict(b=2, j=1, k=1, d=6, s=1, l=1, directions=[0], delta_softplus=1),
    dict(b=2, j=2, k=2, d=6, s=4, l=13, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=4, d=5, s=3, l=10, directions=[0, 1, 0, 1], delta_softplus=0),
    dict(b=1, j=2, k=2, d=3, s=16, l=20, directions=[0, 1], delta_softplus=1),
    dict(b=1, j=1, k=2, d=2, s=1, l=1030, directions=[0, 1], delta_softplus=1),
]
# MobileMamba T2, S6, B2 and B4, whose last stages see 9 to 1024 pixels.
op.shapes = [
    dict(b=1, j=1, k=2, d=d, s=1, l=tokens, directions=[0, 1], delta_softplus=1)
    for d, tokens in ((224, 144), (448, 9), (320, 196), (544, 49), (544, 16), (320, 576), (320, 1024), (512, 256))
]
op.wide = True  # a sum of products of three inputs
op.ranges = {
    "A": (-3.0, -0.1),
    "delta": (0.5, 1.5),
    "delta_bias": (-0.5, 0.5),
}  # without softplus a negative step lets the state grow
