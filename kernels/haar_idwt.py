"""Haar synthesis (MobileMamba's wavelet branch): four sub-bands back to a map, added to a map that gives the size."""

import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._haar import filters, filters_text, group_of
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


op.cases = [
    dict(b=2, c=16, h=6, w=6, e=64, p=3, q=3),
    dict(b=1, c=3, h=7, w=5, e=12, p=4, q=3),
    dict(b=2, c=5, h=3, w=8, e=20, p=2, q=4),
    dict(b=1, c=1, h=1, w=1, e=4, p=1, q=1),
]
