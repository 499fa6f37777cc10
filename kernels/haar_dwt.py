"""Haar analysis (MobileMamba's wavelet branch): a map to its four orthonormal sub-bands at half the size."""

import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._haar import filters, filters_text, group_of
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


op.cases = [
    dict(b=2, c=16, h=6, w=6),
    dict(b=1, c=3, h=7, w=5),
    dict(b=2, c=5, h=3, w=8),
    dict(b=1, c=1, h=1, w=1),
]
