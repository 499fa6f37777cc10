"""Upsampled gate (GhostNetV2): `x sigmoid(g)` with the logits g of a coarser map, each spread over its cell of x."""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.op import Op

op = Op("upsample_gate_mul", "(x[b c h w], g[b c i j]) -> (out[b c h w])")
op.dynamic = ("b", "h", "w", "i", "j")


@op.reference
def reference(x: Tensor, g: Tensor) -> Tensor:
    """out[b, c, y, x] = x[b, c, y, x] sigmoid(g[b, c, floor(y i / h), floor(x j / w)]) (GhostNetV2, section 4.2)."""
    return x * F.interpolate(torch.sigmoid(g), size=x.shape[2:], mode="nearest")
