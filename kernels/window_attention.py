"""Window attention: softmax attention inside the windows of a map, contiguous, dilated over the map, or in between."""

from __future__ import annotations

from torch import Tensor

from edgeattn.kernels._attention import absorb, begin, load_rows, store_rows
from edgeattn.kernels._triton import block, jit, tl
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


@op.kernel(
    grid="b*num_heads*(h//WY)*(w//WX)*cdiv(WY*WX, BN)*cdiv(E, BE)",
    flops="2*b*num_heads*h*w*WY*WX*(D+E)",
    D=lambda values: values["c"] // values["num_heads"],
    E=lambda values: values["e"] // values["num_heads"],
    WY=lambda values: values["window"][0],
    WX=lambda values: values["window"][1],
    IY=lambda values: values["interval"][0],
    IX=lambda values: values["interval"][1],
    BN=lambda values: min(64, block(values["window"][0] * values["window"][1])),
    # These two are the largest without spills on every target.
    BM=lambda values: min(128 // values["itemsize"], block(values["window"][0] * values["window"][1])),
    BD=lambda values: block(values["c"] // values["num_heads"]),
    BE=lambda values: min(128 // values["itemsize"], block(values["e"] // values["num_heads"])),
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
    IY: tl.constexpr,
    IX: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """One program takes BN queries of one window and BE channels of one head, its keys in blocks of BM.

    Along y, slot t of window i is row floor(i / s) w s + i mod s + t s for interval s and window height w, and so along
    x (CrossFormer, section 3.2).
    """
    parts = tl.cdiv(E, BE)
    blocks = tl.cdiv(WY * WX, BN)
    columns = w // WX
    size = h * w
    first = tl.program_id(0) % parts * BE
    token = tl.program_id(0) // parts % blocks * BN + tl.arange(0, BN)
    window = tl.program_id(0) // (parts * blocks)
    group = window // (h // WY * columns)  # item * num_heads + head
    step_y = IY if IY else h // WY
    step_x = IX if IX else columns
    start_y = _start(window // columns % (h // WY), WY, step_y)
    start_x = _start(window % columns, WX, step_x)
    corner = start_y * w + start_x
    pixels = corner + token // WX * step_y * w + token % WX * step_x
    inside = token < WY * WX
    queries = load_rows(q + group * D * size, pixels, inside, 1, size, 0, D, BD)
    top, total, mixed = begin(BN, BE)
    for start in range(0, WY * WX, BM):
        other = start + tl.arange(0, BM)
        places = corner + other // WX * step_y * w + other % WX * step_x
        listed = other < WY * WX
        keys = load_rows(k + group * D * size, places, listed, 1, size, 0, D, BD)
        values = load_rows(v + group * E * size, places, listed, 1, size, first, E, BE)
        top, total, mixed = absorb(top, total, mixed, queries, keys, values, listed[None, :], scale)
    store_rows(out + group * E * size, mixed / total[:, None], pixels, inside, 1, size, first, E, BE)


@jit
def _start(window, side, step):
    """Return the first row, or column, of a window."""
    return window // step * side * step + window % step


op.cases = [
    dict(b=2, c=24, e=48, h=14, w=14, num_heads=2, window=[7, 7], interval=[0, 0], scale=12**-0.5),
    dict(b=1, c=24, e=60, h=14, w=21, num_heads=2, window=[7, 7], interval=[1, 1], scale=1.0),
    dict(b=2, c=15, e=12, h=12, w=24, num_heads=3, window=[3, 4], interval=[2, 3], scale=0.3),
    dict(b=1, c=20, e=70, h=7, w=7, num_heads=1, window=[7, 7], interval=[0, 0], scale=20**-0.5),
    dict(b=2, c=16, e=32, h=16, w=8, num_heads=2, window=[8, 8], interval=[1, 0], scale=1.0),
    dict(b=1, c=8, e=16, h=6, w=10, num_heads=2, window=[6, 2], interval=[0, 1], scale=0.5),
]
# One of the two partitions of EMOv2: 1M and 5M at 224, and 5M at 256.
op.shapes = [
    dict(b=1, c=a * d, e=a * e, h=side, w=side, num_heads=a, window=[window] * 2, interval=[0, 0], scale=1.0)
    for a, d, e, side, window in (
        (4, 20, 60, 14, 7), (9, 20, 70, 7, 7), (5, 32, 128, 14, 7), (9, 32, 128, 7, 7), (5, 32, 128, 16, 8),
    )
]  # fmt: skip
