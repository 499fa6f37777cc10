"""Segment maximum: the largest of the rows that point to each segment (point encoder of DSVT).

There is no kernel: points come in any order, so that without atomics every program would have to read every index.
"""

from torch import Tensor

from edgeattn.kernels._segments import sample_index, scatter_rows, spread
from edgeattn.kernels._statements import Statements
from edgeattn.op import Op

op = Op("segment_max", "(x[p c], index: int32[p], *, segments: int) -> (out[segments+1 c])")
_LOWEST = -3e38


@op.reference
def reference(x: Tensor, index: Tensor, *, segments: int) -> Tensor:
    """Take the maximum per column over the rows with index s; 0 where no row points (PointNet, section 4.2).

    `index` is 0 .. segments; the last segment collects what belongs nowhere.
    """
    out = x.new_zeros(segments + 1, x.shape[1])
    return out.scatter_reduce(0, spread(index, x), x, "amax", include_self=False)


@op.onnx
def body(dims, attributes, dtype):
    text = Statements()
    rows = "x" if dtype == "float" else text.add("Cast", "x", to=1)
    largest = scatter_rows(text, rows, attributes["segments"], dims["c"], _LOWEST, "max")
    empty = text.add("Equal", largest, text.const(_LOWEST, "float"))
    out = "out" if dtype == "float" else "wide"
    text.add("Where", empty, text.const(0.0, "float"), largest, out=out)
    if dtype != "float":
        text.add("CastLike", out, "x", out="out")
    return str(text)


op.sample(sample_index)
op.dynamic = ("p",)
op.plugin_only = True
op.cases = [
    dict(p=50, c=8, segments=20),
    dict(p=301, c=5, segments=40),
    dict(p=3, c=96, segments=100),
    dict(p=1, c=1, segments=1),
]
