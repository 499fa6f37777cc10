"""Segment mean: the average of the rows that point to each segment (point encoder of DSVT).

There is no kernel: points come in any order, so that without atomics every program would have to read every index.
"""

import torch
from torch import Tensor

from edgeattn.kernels._segments import sample_index, scatter_rows
from edgeattn.kernels._statements import Statements
from edgeattn.op import Op

op = Op("segment_mean", "(x[p c], index: int32[p], *, segments: int) -> (out[segments+1 c])")


@op.reference
def reference(x: Tensor, index: Tensor, *, segments: int) -> Tensor:
    """Average per column the rows with index s; 0 where no row points (PointPillars, section 2.1).

    `index` is 0 .. segments; the last segment collects what belongs nowhere. Sums are float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    counted = torch.cat([wide, torch.ones_like(wide[:, :1])], 1)
    total = counted.new_zeros(segments + 1, counted.shape[1]).index_add(0, index.long(), counted)
    return (total[:, :-1] / total[:, -1:].clamp(min=1)).to(x.dtype)


@op.onnx
def body(dims, attributes, dtype):
    """Sum a column of ones with the others: one scatter gives sums and counts."""
    text = Statements()
    rows = "x" if dtype == "float" else text.add("Cast", "x", to=1)
    one = text.const([[1.0]], "float")
    size = text.add("Concat", text.add("Shape", "x", end=1), text.const([1]), axis=0)
    counted = text.add("Concat", rows, text.add("Expand", one, size), axis=1)  # [p, c + 1]
    total = scatter_rows(text, counted, attributes["segments"], dims["c"] + 1, 0.0, "add")
    ends = [text.const([end]) for end in (0, dims["c"], dims["c"] + 1)]
    sums = text.add("Slice", total, ends[0], ends[1], text.const([1]))
    counts = text.add("Slice", total, ends[1], ends[2], text.const([1]))
    out = "out" if dtype == "float" else "wide"
    text.add("Div", sums, text.add("Max", counts, text.const(1.0, "float")), out=out)
    if dtype != "float":
        text.add("CastLike", out, "x", out="out")
    return str(text)


op.sample(sample_index)
op.dynamic = ("p",)
op.plugin_only = True
op.wide = True  # means of coordinates: half precision loses centimetres
op.cases = [
    dict(p=50, c=3, segments=20),
    dict(p=301, c=5, segments=40),
    dict(p=3, c=3, segments=100),
    dict(p=1, c=1, segments=1),
]
