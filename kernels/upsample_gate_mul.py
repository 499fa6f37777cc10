"""Upsampled gate (GhostNetV2): `x sigmoid(g)`, with every logit of the coarser map g spread over its cell of x."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._triton import area, tl
from edgeattn.op import Op, constant

op = Op("upsample_gate_mul", "(x[b c h w], g[b c i j]) -> (out[b c h w])")

_RESIZE = 'Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
# A product with the 0/1 matrix of cells takes 0.4 to 0.7 of the time of Resize up to about this many entries (the last
# stage, 3 x 3 to 7 x 7, has 441), and twice its time at 140 000.
_LARGEST_MATRIX = 12_000


@op.reference
def reference(x: Tensor, g: Tensor) -> Tensor:
    """out[b, c, y, x] = x[b, c, y, x] sigmoid(g[b, c, floor(y i / h), floor(x j / w)]) (GhostNetV2, section 4.2)."""
    return x * F.interpolate(torch.sigmoid(g), size=x.shape[2:], mode="nearest")


@op.onnx
def body(dims, attributes, dtype):
    return f"""
        coarse = Sigmoid(g)
        {_upsample(*(dims[name] for name in "hwij"), dtype)}
        out = Mul(x, gate)
    """


def _upsample(h, w, i, j, dtype):
    """Return the statements that spread `coarse` to the size of x."""
    if None in (h, w, i, j):
        return f"size = Shape<start = 2>(x)\ngate = {_RESIZE}, axes = [2, 3]>(coarse, , , size)"
    if h % i == 0 and w % j == 0:  # ONNX Runtime's blocked layout knows whole scales only, and needs all four
        return f"{constant('scales', [1.0, 1.0, h // i, w // j], 'float')}\ngate = {_RESIZE}>(coarse, , scales)"
    if i * j * h * w > _LARGEST_MATRIX:
        return f"{constant('size', [h, w])}\ngate = {_RESIZE}, axes = [2, 3]>(coarse, , , size)"
    return f"""
        {constant("flat", [0, 0, i * j])}
        rows = Reshape(coarse, flat)
        {constant("cells", _cells(h, w, i, j), dtype)}
        spread = MatMul(rows, cells)
        {constant("size", [0, 0, h, w])}
        gate = Reshape(spread, size)
    """


def _cells(h, w, i, j):
    """Return the matrix [i * j, h * w] with a one where the coarse cell covers the position."""
    rows = np.arange(h) * i // h == np.arange(i)[:, None]  # [i, h]
    columns = np.arange(w) * j // w == np.arange(j)[:, None]
    return np.kron(rows, columns).astype(float)


@op.kernel(
    grid="cdiv(b*c, C)*cdiv(h*w, BP)",
    flops="b*c*(h*w + 3*i*j)",
    C=lambda dims: 1024 // area(dims["h"], dims["w"]),
    BP=lambda dims: area(dims["h"], dims["w"]),
)
def kernel(x, g, b, c, h, w, i, j, out, C: tl.constexpr, BP: tl.constexpr):
    """One program takes BP places of x in C channels, which share its divisions; the places of a cell share a gate."""
    blocks = tl.cdiv(h * w, BP)
    lanes = tl.arange(0, C * BP)  # one axis: lanes lie along the places, whose divisions C channels share
    plane = (tl.program_id(0) // blocks).to(tl.int64) * C + lanes // BP
    place = (tl.program_id(0) % blocks) * BP + lanes % BP
    cell = (place // w) * i // h * j + (place % w) * j // w
    inside = (plane < b * c) & (place < h * w)
    gate = tl.load(g + plane * i * j + cell, mask=inside, other=0.0).to(tl.float32)
    at = plane * h * w + place
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / (1.0 + tl.exp(-gate))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


op.cases = [
    dict(b=2, c=16, h=28, w=28, i=14, j=14),
    dict(b=2, c=20, h=7, w=7, i=3, j=3),
    dict(b=1, c=6, h=9, w=14, i=4, j=7),
    dict(b=1, c=6, h=21, w=25, i=10, j=12),
    dict(b=3, c=5, h=3, w=8, i=1, j=4),
]
# GhostNetV2 1.0.
op.shapes = [
    dict(b=1, c=channels, h=size, w=size, i=size // 2, j=size // 2)
    for channels, size in ((72, 56), (240, 28), (672, 14), (960, 7))
]
