"""Hybrid window attention (EMOv2): attention in windows dilated over the whole map plus attention in tiles."""

import torch
from torch import Tensor

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


op.cases = [
    dict(b=2, c=40, e=80, h=14, w=14, num_heads=2, window=[7, 7], scale=20**-0.5),
    dict(b=1, c=36, e=126, h=7, w=7, num_heads=2, window=[7, 7], scale=1.0),
    dict(b=2, c=24, e=60, h=14, w=21, num_heads=2, window=[7, 7], scale=12**-0.5),
    dict(b=1, c=32, e=64, h=16, w=8, num_heads=1, window=[8, 8], scale=1.0),
    dict(b=1, c=15, e=48, h=6, w=12, num_heads=3, window=[3, 4], scale=0.3),
]
