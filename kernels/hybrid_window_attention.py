"""Hybrid window attention (EMOv2): attention in windows dilated over the whole map plus attention in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.kernels._attention import absorb, begin, load_rows, store_rows
from edgeattn.kernels._triton import block, tl
from edgeattn.kernels._windows import attention_body, check, widened
from edgeattn.op import Op

op = Op(
    "hybrid_window_attention",
    "(q[b c h w], k[b c h w], v[b e h w], *, num_heads: int, window: ints, scale: float) -> (out[b e h w])",
)


@op.reference
def reference(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, window: list[int], scale: float) -> Tensor:
    """Add the attentions of the remote and the close grid (EMOv2, section 3.3).

    Remote window (i, j) has every (h / wy)-th row from i and every (w / wx)-th column from j, close window (i, j) is a
    tile. Heads are packed as in `window_attention`. Raises EA0110 unless windows and heads come out whole.
    """
    check("hybrid_window_attention", q, v, num_heads, window, [1, 1])
    height, width = q.shape[2:]
    both = torch.cat([q, k], 1)  # one tensor as in the original, where one convolution makes it
    total = []
    for remote in (True, False):
        rows = _windows(widened(both), window, remote).unflatten(1, (2, num_heads, -1)).permute(1, 0, 2, 4, 5, 3)
        values = _windows(widened(v), window, remote).unflatten(1, (num_heads, -1)).permute(0, 1, 3, 4, 2)
        rows, values = rows.flatten(3, 4), values.flatten(2, 3)  # [b windows, heads, tokens, channels]
        weights = (rows[0] @ rows[1].transpose(-2, -1) * scale).softmax(-1)
        total.append(_map(weights @ values, window, height, width, remote))
    return (total[0] + total[1]).to(q.dtype)


def _windows(x: Tensor, window: list[int], remote: bool) -> Tensor:
    """Cut [b, c, h, w] into [b windows, c, wy, wx]."""
    batch, channels, height, width = x.shape
    wy, wx = window
    if remote:
        x = x.reshape(batch, channels, wy, height // wy, wx, width // wx).permute(0, 3, 5, 1, 2, 4)
    else:
        x = x.reshape(batch, channels, height // wy, wy, width // wx, wx).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, channels, wy, wx)


def _map(x: Tensor, window: list[int], height: int, width: int, remote: bool) -> Tensor:
    """Put [b windows, heads, tokens, e / heads] back on the map: [b, e, h, w]."""
    count, heads, _, channels = x.shape
    wy, wx = window
    x = x.reshape(count, heads, wy, wx, channels).permute(0, 1, 4, 2, 3)
    x = x.reshape(-1, height // wy, width // wx, heads * channels, wy, wx)
    x = x.permute(0, 3, 4, 1, 5, 2) if remote else x.permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, heads * channels, height, width).contiguous()


@op.onnx
def body(dims, attributes, dtype):
    return attention_body(dims, attributes, dtype, [[0, 0], [1, 1]])


@op.kernel(
    # Bands of window height, times rows of the same remote windows, times blocks of their pixels.
    grid="b*num_heads*(h//WY)*(h//WY)*cdiv(cdiv(WY, h//WY)*w, BN)*cdiv(E, BE)",
    flops="4*b*num_heads*h*w*WY*WX*(D+E)",
    D=lambda values: values["c"] // values["num_heads"],
    E=lambda values: values["e"] // values["num_heads"],
    WY=lambda values: values["window"][0],
    WX=lambda values: values["window"][1],
    BN=64,
    # These two are the largest without spills on every target.
    BM=lambda values: 64 // values["itemsize"],
    BD=lambda values: block(values["c"] // values["num_heads"]),
    BE=lambda values: min(128 // values["itemsize"], block(values["e"] // values["num_heads"])),
    num_stages=1,
)
def kernel(
    q,
    k,
    v,
    h,
    w,
    out,
    num_heads: tl.constexpr,
    scale: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WY: tl.constexpr,
    WX: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """One program owns the pixels of all rows that share their remote and their close windows along y.

    Its keys are whole rows of the map, first those of the remote windows, then those of the close ones, read as they
    lie in memory; a mask along x selects the window. So both attentions of a pixel are added in registers, for as many
    times the products as there are windows side by side: two at 14 x 14. On a map of one window both are the same.
    """
    ny = h // WY
    nx = w // WX
    size = h * w
    parts = tl.cdiv(E, BE)
    blocks = tl.cdiv(tl.cdiv(WY, ny) * w, BN)
    first = tl.program_id(0) % parts * BE
    number = tl.program_id(0) // parts % blocks * BN + tl.arange(0, BN)
    cell = tl.program_id(0) // (parts * blocks)
    remote = cell % ny
    close = cell // ny % ny * WY
    group = cell // (ny * ny)  # item * num_heads + head
    y = close + (remote + size - close) % ny + number // w * ny
    x = number % w
    inside = y < close + WY
    pixels = y * w + x
    queries = load_rows(q + group * D * size, pixels, inside, 1, size, 0, D, BD)
    result = tl.zeros([BN, BE], tl.float32)
    same = ny * nx == 1
    for tiled in range(0, tl.where(same, 1, 2)):
        start_y = tl.where(tiled == 1, close, remote)
        step_y = tl.where(tiled == 1, 1, ny)
        own = tl.where(tiled == 1, x // WX, x % nx)
        top, total, mixed = begin(BN, BE)
        for start in range(0, WY * w, BM):
            other = start + tl.arange(0, BM)
            listed = other < WY * w
            places = (start_y + other // w * step_y) * w + other % w
            theirs = tl.where(tiled == 1, other % w // WX, other % w % nx)
            keys = load_rows(k + group * D * size, places, listed, 1, size, 0, D, BD)
            values = load_rows(v + group * E * size, places, listed, 1, size, first, E, BE)
            keep = listed[None, :] & (own[:, None] == theirs[None, :])
            top, total, mixed = absorb(top, total, mixed, queries, keys, values, keep, scale)
        result += mixed / total[:, None]
    result = tl.where(same, 2 * result, result)
    store_rows(out + group * E * size, result, pixels, inside, 1, size, first, E, BE)


op.cases = [
    dict(b=2, c=40, e=80, h=14, w=14, num_heads=2, window=[7, 7], scale=20**-0.5),
    dict(b=1, c=36, e=126, h=7, w=7, num_heads=2, window=[7, 7], scale=1.0),
    dict(b=2, c=24, e=60, h=14, w=21, num_heads=2, window=[7, 7], scale=12**-0.5),
    dict(b=1, c=32, e=64, h=16, w=8, num_heads=1, window=[8, 8], scale=1.0),
    dict(b=1, c=15, e=48, h=6, w=12, num_heads=3, window=[3, 4], scale=0.3),
]
# EMOv2 1M and 5M at 224, both stages with attention, and 5M at 256 and 512.
op.shapes = [
    dict(b=1, c=heads * d, e=heads * e, h=side, w=side, num_heads=heads, window=[window] * 2, scale=1.0)
    for heads, d, e, side, window in (
        (4, 20, 60, 14, 7), (9, 20, 70, 7, 7), (5, 32, 128, 14, 7), (9, 32, 128, 7, 7), (5, 32, 128, 16, 8),
        (5, 32, 128, 32, 8),
    )
]  # fmt: skip
