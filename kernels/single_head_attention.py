"""Single-head attention (SHViT): `v softmax(scale q^T k)^T`, channels first, value width free of the key width."""

from __future__ import annotations

from torch import Tensor

from edgeattn.kernels._attention import absorb, begin, load_rows, store_rows
from edgeattn.kernels._triton import block, tl
from edgeattn.op import Op

op = Op("single_head_attention", "(q[b d n], k[b d m], v[b e m], *, scale: float) -> (out[b e n])")


@op.reference
def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """out[b, :, i] = sum_j softmax_j(scale <q[b, :, i], k[b, :, j]>) v[b, :, j] (SHViT, section 3.2)."""
    attention = (scale * q.transpose(1, 2) @ k).softmax(-1)  # [b, n, m]
    return v @ attention.transpose(1, 2)


@op.onnx
def body(dims, attributes, dtype):
    half = dtype != "float"
    factor = "" if attributes["scale"] == 1.0 else "factor = Constant<value_float: float = @scale>()"
    return f"""
        rows = Transpose<perm = [0, 2, 1]>(q)
        product = MatMul(rows, k)
        {"wide = Cast<to = 1>(product)" if half else ""}
        {factor}
        {f"logits = Mul({'wide' if half else 'product'}, factor)" if factor else ""}
        weights = Softmax<axis = -1>({"logits" if factor else "wide" if half else "product"})
        {"narrow = CastLike(weights, q)" if half else ""}
        columns = Transpose<perm = [0, 2, 1]>({"narrow" if half else "weights"})
        out = MatMul(v, columns)
    """


@op.kernel(
    grid="b*cdiv(n, BN)*cdiv(e, BE)",
    flops="2*b*n*m*(d+e)",
    BN=32,
    BM=64,
    BD=lambda dims: block(dims["d"]),
    BE=32,
)
def kernel(
    q,
    k,
    v,
    n,
    m,
    out,
    scale: tl.constexpr,
    d: tl.constexpr,
    e: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """One program takes BN queries and BE channels of the values of one image, and streams its keys in blocks of BM.

    The values are several times as wide as the keys: scores computed anew for each BE cost little.
    """
    parts = tl.cdiv(e, BE)
    blocks = tl.cdiv(n, BN)
    first = tl.program_id(0) % parts * BE
    rows = tl.program_id(0) // parts % blocks * BN + tl.arange(0, BN)
    item = tl.program_id(0) // (parts * blocks)
    queries = load_rows(q + item * d * n, rows, rows < n, 1, n, 0, d, BD)
    top, total, mixed = begin(BN, BE)
    for start in range(0, m, BM):
        columns = start + tl.arange(0, BM)
        inside = columns < m
        keys = load_rows(k + item * d * m, columns, inside, 1, m, 0, d, BD)
        values = load_rows(v + item * e * m, columns, inside, 1, m, first, e, BE)
        top, total, mixed = absorb(top, total, mixed, queries, keys, values, inside[None, :], scale)
    store_rows(out + item * e * n, mixed / total[:, None], rows, rows < n, 1, n, first, e, BE)


op.cases = [
    dict(b=2, d=16, n=49, m=49, e=48, scale=0.25),
    dict(b=1, d=16, n=17, m=33, e=68, scale=0.25),
]
# SHViT S1, S3 and S4, both stages with attention.
op.shapes = [
    dict(b=1, d=16, n=tokens, m=tokens, e=width, scale=16**-0.5)
    for tokens, width in ((49, 48), (16, 68), (49, 75), (64, 72), (16, 96))
]
