"""Window attention: softmax attention inside the windows of a map, contiguous, dilated over the map, or in between."""

from torch import Tensor

from edgeattn.kernels._windows import attention_body, check, widened
from edgeattn.op import Op

op = Op(
    "window_attention",
    "(q[b c h w], k[b c h w], v[b e h w], *, num_heads: int, window: ints, interval: ints, scale: float)"
    " -> (out[b e h w])",
)


@op.reference
def reference(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, window: list[int], interval: list[int], scale: float
) -> Tensor:
    """Attend inside windows of every interval-th pixel: 1 is contiguous, 0 spreads each window over the whole map.

    Head a of q and k has channels a c / heads onwards, of v channels a e / heads (CrossFormer, section 3.2; EMOv2,
    section 3.3). Raises EA0110 unless windows and heads come out whole.
    """
    check("window_attention", q, v, num_heads, window, interval)
    height, width = q.shape[2:]
    rows, columns, values = (_windows(widened(x), num_heads, window, interval) for x in (q, k, v))
    weights = (rows @ columns.transpose(-2, -1) * scale).softmax(-1)
    return _map(weights @ values, window, height, width).to(q.dtype)


def _windows(x: Tensor, heads: int, window: list[int], interval: list[int]) -> Tensor:
    """Group [b, c, h, w] into [b, windows along y (2 axes) and x (2 axes), heads, tokens, c / heads]."""
    batch, channels, height, width = x.shape
    wy, wx = window
    iy, ix = interval[0] or height // wy, interval[1] or width // wx
    x = x.reshape(batch, heads, channels // heads, height // (wy * iy), wy, iy, width // (wx * ix), wx, ix)
    return x.permute(0, 3, 5, 6, 8, 1, 4, 7, 2).flatten(6, 7)


def _map(x: Tensor, window: list[int], height: int, width: int) -> Tensor:
    """Put [b, windows (4 axes), heads, tokens, e / heads] back on the map: [b, e, h, w]."""
    x = x.unflatten(6, window).permute(0, 5, 8, 1, 6, 2, 3, 7, 4)
    return x.reshape(len(x), -1, height, width).contiguous()


@op.onnx
def body(dims, attributes, dtype):
    return attention_body(dims, attributes, dtype, [attributes["interval"]])


op.cases = [
    dict(b=2, c=24, e=48, h=14, w=14, num_heads=2, window=[7, 7], interval=[0, 0], scale=12**-0.5),
    dict(b=1, c=24, e=60, h=14, w=21, num_heads=2, window=[7, 7], interval=[1, 1], scale=1.0),
    dict(b=2, c=15, e=12, h=12, w=24, num_heads=3, window=[3, 4], interval=[2, 3], scale=0.3),
    dict(b=1, c=20, e=70, h=7, w=7, num_heads=1, window=[7, 7], interval=[0, 0], scale=20**-0.5),
    dict(b=2, c=16, e=32, h=16, w=8, num_heads=2, window=[8, 8], interval=[1, 0], scale=1.0),
    dict(b=1, c=8, e=16, h=6, w=10, num_heads=2, window=[6, 2], interval=[0, 1], scale=0.5),
]
