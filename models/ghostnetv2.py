"""GhostNetV2: half of the channels from a depthwise convolution of the other half, gated by long-range attention.

Paper: Tang et al., "GhostNetV2: Enhance Cheap Operation with Long-Range Attention", NeurIPS 2022.
Source: github.com/huawei-noah/Efficient-AI-Backbones, ghostnetv2_pytorch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.kernels import upsample_gate_mul
from edgeattn.model import Checkpoint, Model, image, register


def _round(value: float) -> int:
    """Return the multiple of 4 nearest to `value` that does not fall below 0.9 of it."""
    rounded = max(4, int(value + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * value else rounded


def _conv_norm(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size (at stride 1) and its norm."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2)
    return [
        nn.Conv2d(inputs, outputs, (height, width), stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class GhostModule(nn.Module):
    """Concatenate a pointwise convolution and a depthwise one of its result; `gated` adds the DFC attention."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool, gated: bool) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.outputs = outputs
        act = nn.ReLU if relu else nn.Identity
        self.primary_conv = nn.Sequential(*_conv_norm(inputs, half), act())
        self.cheap_operation = nn.Sequential(*_conv_norm(half, half, 3, groups=half), act())
        if gated:
            self.short_conv = nn.Sequential(
                *_conv_norm(inputs, outputs),
                *_conv_norm(outputs, outputs, (1, 5), groups=outputs),
                *_conv_norm(outputs, outputs, (5, 1), groups=outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        primary = self.primary_conv(x)
        out = torch.cat([primary, self.cheap_operation(primary)], 1)[:, : self.outputs]
        if not hasattr(self, "short_conv"):
            return out
        gate = self.short_conv(F.avg_pool2d(x, 2, 2))
        return upsample_gate_mul.op(out, gate)


class SqueezeExcite(nn.Module):
    """Per-channel hard-sigmoid gate from the spatial mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(width, _round(width / 4), 1)
        self.conv_expand = nn.Conv2d(_round(width / 4), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        gate = self.conv_expand(F.relu(self.conv_reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * (F.relu6(gate + 3) / 6)


class Bottleneck(nn.Module):
    """Ghost module up, depthwise convolution if strided, squeeze-excite, ghost module down, plus the shortcut."""

    def __init__(self, inputs: int, mid: int, outputs: int, kernel: int, stride: int, *, se: bool, gated: bool) -> None:
        super().__init__()
        self.ghost1 = GhostModule(inputs, mid, relu=True, gated=gated)
        if stride > 1:
            self.conv_dw, self.bn_dw = _conv_norm(mid, mid, kernel, stride, mid)
        self.se = SqueezeExcite(mid) if se else nn.Identity()
        self.ghost2 = GhostModule(mid, outputs, relu=False, gated=False)
        same = inputs == outputs and stride == 1
        layers = [] if same else [*_conv_norm(inputs, inputs, kernel, stride, inputs), *_conv_norm(inputs, outputs)]
        self.shortcut = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, ceil(h / stride), ceil(w / stride)]."""
        inner = self.ghost1(x)
        if hasattr(self, "conv_dw"):
            inner = self.bn_dw(self.conv_dw(inner))
        out: Tensor = self.ghost2(self.se(inner)) + self.shortcut(x)
        return out


class ConvNormAct(nn.Module):
    """Pointwise convolution, norm, ReLU: the last block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn1 = _conv_norm(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        return F.relu(self.bn1(self.conv(x)))


# One line per stage of bottlenecks: kernel, inner width, width, squeeze-excite, stride.
_STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    ((3, 200, 80, False, 1), (3, 184, 80, False, 1), (3, 184, 80, False, 1), (3, 480, 112, True, 1), (3, 672, 112, True, 1)),
    ((5, 672, 160, True, 2),),
    ((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)


class GhostNetV2(nn.Module):
    """The network at `scale` times the widths of the table."""

    def __init__(self, scale: float, classes: int = 1000) -> None:
        super().__init__()
        width = _round(16 * scale)
        self.conv_stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        mid, index = 0, 0
        for rows in _STAGES:
            blocks = []
            for kernel, inner, outputs, se, stride in rows:
                mid, inputs, width = _round(inner * scale), width, _round(outputs * scale)
                blocks.append(Bottleneck(inputs, mid, width, kernel, stride, se=se, gated=index > 1))
                index += 1
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages, nn.Sequential(ConvNormAct(width, mid)))
        self.conv_head = nn.Conv2d(mid, 1280, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images [b, 3, h, w] to logits [b, classes]."""
        x = self.blocks(F.relu(self.bn1(self.conv_stem(image))))
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        logits: Tensor = self.classifier(self.dropout(x.flatten(1)))
        return logits
