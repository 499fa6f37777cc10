"""Haar analysis (MobileMamba's wavelet branch): a map to its four orthonormal sub-bands at half the size."""

import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._haar import filters, filters_text, group_of
from edgeattn.kernels._triton import area, tl
from edgeattn.op import Op

op = Op("haar_dwt", "(x[b c h w]) -> (s[b 4*c cdiv(h,2) cdiv(w,2)])")


@op.reference
def reference(x: Tensor) -> Tensor:
    """s[4c + band] = one-level Haar transform of channel c; odd sizes end in a zero row or column."""
    channels, height, width = x.shape[1:]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    return F.conv2d(x, filters(channels, x), stride=2, groups=channels)


@op.onnx
def body(dims, attributes, dtype):
    places = None if None in (dims["h"], dims["w"]) else dims["h"] * dims["w"]
    group = group_of(dims["c"], places, 20 * 20)
    # SAME_UPPER pads an odd size by one at the end, whatever the size: no Pad node, and nothing to specialise.
    return f"""
        {filters_text(dims["c"], group, dtype)}
        s = Conv<auto_pad = "SAME_UPPER", kernel_shape = [2, 2], strides = [2, 2],
            group = {dims["c"] // group}>(x, filters)
    """


@op.kernel(
    grid="cdiv(b*c, C)*cdiv(cdiv(h,2)*cdiv(w,2), BP)",
    flops="12*b*c*cdiv(h,2)*cdiv(w,2)",
    C=lambda dims: 512 // area(dims["h"], dims["w"], 4),
    BP=lambda dims: area(dims["h"], dims["w"], 4),
)
def kernel(x, b, c, h, w, s, C: tl.constexpr, BP: tl.constexpr):
    """One program takes BP places of the half-size map in C channels: it reads every 2 x 2 cell once."""
    width = tl.cdiv(w, 2)
    places = tl.cdiv(h, 2) * width
    blocks = tl.cdiv(places, BP)
    lanes = tl.arange(0, C * BP)  # one axis: lanes lie along the places, whose divisions C channels share
    plane = (tl.program_id(0) // blocks).to(tl.int64) * C + lanes // BP
    place = (tl.program_id(0) % blocks) * BP + lanes % BP
    row, column = 2 * (place // width), 2 * (place % width)
    inside = (plane < b * c) & (place < places)
    corner = x + plane * h * w + (row * w + column)
    below, right = row + 1 < h, column + 1 < w  # odd sizes end in zeros
    v00 = tl.load(corner, mask=inside, other=0.0).to(tl.float32)
    v01 = tl.load(corner + 1, mask=inside & right, other=0.0).to(tl.float32)
    v10 = tl.load(corner + w, mask=inside & below, other=0.0).to(tl.float32)
    v11 = tl.load(corner + w + 1, mask=inside & below & right, other=0.0).to(tl.float32)
    top, bottom, lean, tilt = v00 + v01, v10 + v11, v00 - v01, v10 - v11
    band = s + plane * 4 * places + place
    tl.store(band, (0.5 * (top + bottom)).to(s.dtype.element_ty), mask=inside)
    tl.store(band + places, (0.5 * (top - bottom)).to(s.dtype.element_ty), mask=inside)
    tl.store(band + 2 * places, (0.5 * (lean + tilt)).to(s.dtype.element_ty), mask=inside)
    tl.store(band + 3 * places, (0.5 * (lean - tilt)).to(s.dtype.element_ty), mask=inside)


op.cases = [
    dict(b=2, c=16, h=6, w=6),
    dict(b=1, c=3, h=7, w=5),
    dict(b=2, c=5, h=3, w=8),
    dict(b=1, c=1, h=1, w=1),
]
# MobileMamba T2, S6 and B4.
op.shapes = [
    dict(b=1, c=channels, h=size, w=size)
    for channels, size in ((224, 3), (160, 14), (272, 7), (272, 4), (160, 32), (256, 16), (272, 8))
]
