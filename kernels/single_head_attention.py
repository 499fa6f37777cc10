"""Single-head attention (SHViT): `v softmax(scale q^T k)^T`, channels first, value width free of the key width."""

from torch import Tensor

from edgeattn.op import Op

op = Op("single_head_attention", "(q[b d n], k[b d m], v[b e m], *, scale: float) -> (out[b e n])")


@op.reference
def reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """out[b, :, i] = sum_j softmax_j(scale <q[b, :, i], k[b, :, j]>) v[b, :, j] (SHViT, section 3.2)."""
    attention = (scale * q.transpose(1, 2) @ k).softmax(-1)  # [b, n, m]
    return v @ attention.transpose(1, 2)


@op.onnx
def body(dims, attributes, dtype):
    scaled = "factor = Constant<value_float: float = @scale>()\nlogits = Mul(product, factor)"
    return f"""
        rows = Transpose<perm = [0, 2, 1]>(q)
        product = MatMul(rows, k)
        {scaled if attributes["scale"] != 1.0 else "logits = Identity(product)"}
        weights = Softmax<axis = -1>(logits)
        columns = Transpose<perm = [0, 2, 1]>(weights)
        out = MatMul(v, columns)
    """


op.cases = [
    dict(b=2, d=16, n=49, m=49, e=48, scale=0.25),
    dict(b=1, d=16, n=17, m=33, e=68, scale=0.25),
]
