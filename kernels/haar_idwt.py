"""Haar synthesis (MobileMamba's wavelet branch): four sub-bands back to a map, added to a map that gives the size."""

import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._haar import filters, filters_text, group_of
from edgeattn.kernels._triton import area, tl
from edgeattn.op import Op

op = Op("haar_idwt", "(s[b e p q], base[b c h w]) -> (out[b c h w])")  # e = 4 c, p = ceil(h / 2), q = ceil(w / 2)


@op.reference
def reference(s: Tensor, base: Tensor) -> Tensor:
    """out = base + the transpose of Haar analysis applied to s, cropped to the size of base."""
    channels, height, width = base.shape[1:]
    restored = F.conv_transpose2d(s, filters(channels, s), stride=2, groups=channels)
    return base + restored[:, :, :height, :width]


@op.onnx
def body(dims, attributes, dtype):
    height, width = dims["h"], dims["w"]
    static = height is not None and width is not None
    pads = f"[0, 0, {height % 2}, {width % 2}]" if static else "[0, 0, 0, 0]"
    group = group_of(dims["c"], height * width if static else None, 10 * 10)
    crop = """
        size = Shape<start = 2, end = 4>(base)
        corner = Constant<value_ints = [0, 0]>()
        axes = Constant<value_ints = [2, 3]>()
        restored = Slice(full, corner, size, axes)
    """
    return f"""
        {filters_text(dims["c"], group, dtype).replace("x)", "base)")}
        {"restored" if static else "full"} = ConvTranspose<kernel_shape = [2, 2], strides = [2, 2], pads = {pads},
            group = {dims["c"] // group}>(s, filters)
        {"" if static else crop}
        out = Add(base, restored)
    """


@op.kernel(
    grid="cdiv(b*c, C)*cdiv(h*w, BP)",
    flops="16*b*c*p*q",
    C=lambda dims: 1024 // area(dims["h"], dims["w"]),
    BP=lambda dims: area(dims["h"], dims["w"]),
)
def kernel(s, base, b, c, h, w, out, C: tl.constexpr, BP: tl.constexpr):
    """One program takes BP places of the full map in C channels; the four places of a cell share its bands in cache."""
    width = tl.cdiv(w, 2)
    places = tl.cdiv(h, 2) * width
    blocks = tl.cdiv(h * w, BP)
    lanes = tl.arange(0, C * BP)  # one axis: lanes lie along the places, whose divisions C channels share
    plane = (tl.program_id(0) // blocks).to(tl.int64) * C + lanes // BP
    place = (tl.program_id(0) % blocks) * BP + lanes % BP
    row, column = place // w, place % w
    inside = (plane < b * c) & (place < h * w)
    band = s + plane * 4 * places + ((row // 2) * width + column // 2)
    total = tl.load(band, mask=inside, other=0.0).to(tl.float32)
    vertical = tl.load(band + places, mask=inside, other=0.0).to(tl.float32)
    horizontal = tl.load(band + 2 * places, mask=inside, other=0.0).to(tl.float32)
    diagonal = tl.load(band + 3 * places, mask=inside, other=0.0).to(tl.float32)
    down, along = (1 - 2 * (row % 2)).to(tl.float32), (1 - 2 * (column % 2)).to(tl.float32)
    restored = 0.5 * (total + down * vertical + along * (horizontal + down * diagonal))
    at = plane * h * w + place
    value = tl.load(base + at, mask=inside, other=0.0).to(tl.float32) + restored
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


op.cases = [
    dict(b=2, c=16, h=6, w=6, e=64, p=3, q=3),
    dict(b=1, c=3, h=7, w=5, e=12, p=4, q=3),
    dict(b=2, c=5, h=3, w=8, e=20, p=2, q=4),
    dict(b=1, c=1, h=1, w=1, e=4, p=1, q=1),
]
# MobileMamba T2, S6 and B4.
op.shapes = [
    dict(b=1, c=channels, h=size, w=size, e=4 * channels, p=(size + 1) // 2, q=(size + 1) // 2)
    for channels, size in ((224, 3), (160, 14), (272, 7), (272, 4), (160, 32), (256, 16), (272, 8))
]
