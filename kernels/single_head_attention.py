"""Single-head attention (SHViT): `v softmax(scale q^T k)^T`, channels first, value width free of the key width."""

from __future__ import annotations

from torch import Tensor

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


@op.kernel(grid="b*cdiv(n, BN)", BN=32, BM=32, BD=lambda dims: block(dims["d"]), BE=lambda dims: block(dims["e"]))
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
    """One program takes BN queries of one image and streams its keys in blocks of BM (online softmax)."""
    blocks = tl.cdiv(n, BN)
    item = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    widths = tl.arange(0, BD)
    values = tl.arange(0, BE)
    queries = tl.load(
        q + (item * d + widths[:, None]) * n + rows[None, :],
        mask=(widths[:, None] < d) & (rows[None, :] < n),
        other=0.0,
    )  # [BD, BN]
    top = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    mixed = tl.zeros([BN, BE], tl.float32)
    for start in range(0, m, BM):
        columns = start + tl.arange(0, BM)
        inside = columns[None, :] < m
        keys = tl.load(
            k + (item * d + widths[:, None]) * m + columns[None, :], mask=(widths[:, None] < d) & inside, other=0.0
        )
        # ieee: TF32 would cost float32 callers three digits, and these products are small.
        logits = tl.dot(tl.trans(queries), keys, input_precision="ieee") * scale
        logits = tl.where(inside, logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - peak[:, None])
        rescale = tl.exp(top - peak)
        total = total * rescale + tl.sum(weights, 1)
        content = tl.load(
            v + (item * e + values[:, None]) * m + columns[None, :], mask=(values[:, None] < e) & inside, other=0.0
        )
        mixed = mixed * rescale[:, None] + tl.dot(weights.to(content.dtype), tl.trans(content), input_precision="ieee")
        top = peak
    result = mixed / total[:, None]
    place = out + (item * e + values[None, :]) * n + rows[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=(values[None, :] < e) & (rows[:, None] < n))


op.cases = [
    dict(b=2, d=16, n=49, m=49, e=48, scale=0.25),
    dict(b=1, d=16, n=17, m=33, e=68, scale=0.25),
]
