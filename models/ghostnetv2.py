"""GhostNetV2: half of the channels from a depthwise convolution of the other half, gated by long-range attention.

Paper: Tang et al., "GhostNetV2: Enhance Cheap Operation with Long-Range Attention", NeurIPS 2022.
Source: github.com/huawei-noah/Efficient-AI-Backbones, ghostnetv2_pytorch.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.kernels import upsample_gate_mul
from edgeattn.model import Checkpoint, Model, image, register
from edgeattn.models._channels import Channels, folded, identity, stack, store
from edgeattn.models._layers import fuse_conv_norm


class GhostModule(nn.Module):
    """Pointwise convolution and a depthwise one of its result, concatenated; `gated` by the DFC attention."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool, gated: bool) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.inputs, self.outputs = inputs, outputs
        act = nn.ReLU if relu else nn.Identity
        self.primary_conv = nn.Sequential(*_conv_norm(inputs, half), act())
        self.cheap_operation = nn.Sequential(*_conv_norm(half, half, (3, 3), groups=half), act())
        self.short_conv = nn.Sequential()
        if gated:
            self.short_conv.extend(_conv_norm(inputs, outputs))
            self.short_conv.extend(_conv_norm(outputs, outputs, (1, 5), groups=outputs))
            self.short_conv.extend(_conv_norm(outputs, outputs, (5, 1), groups=outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        primary = self.primary_conv(x)
        out = torch.cat([primary, self.cheap_operation(primary)], 1)[:, : self.outputs]
        if not self.short_conv:
            return out
        gated: Tensor = upsample_gate_mul.op(out, self.short_conv(F.avg_pool2d(x, 2)))
        return gated

    def channels(self, align: int) -> Channels:
        """Return how the output is best stored: by halves, or side by side where that takes fewer channels.

        Side by side, the pointwise convolution writes its half twice, which many inputs make too dear. Padding to 16
        alone makes ONNX Runtime 1.3 times faster; the choice saves 12 nodes and 1 to 4 % more.
        """
        halves, joined = Channels.halves(self.outputs, align), Channels.joined(self.outputs, align)
        return joined if joined.width < halves.width and self.inputs <= 3 * self.outputs else halves

    def stored(self, inputs: Channels, outputs: Channels, align: int) -> nn.Module:
        """Return the deploy form between these stored maps."""
        primary, cheap = folded(self.primary_conv)[0], folded(self.cheap_operation)[0]
        concat = outputs == Channels.halves(self.outputs, align)
        hidden = Channels.joined(primary.out_channels, align) if concat else outputs
        if not concat:
            cheap = stack(identity(cheap), cheap, self.outputs)
            primary = stack(primary, primary, self.outputs)
        primary, cheap = store(primary, inputs, hidden), store(cheap, hidden, hidden)
        gate = [store(conv, inputs if conv.groups == 1 else outputs, outputs) for conv in folded(self.short_conv)]
        return StoredGhost(primary, cheap, copy.deepcopy(self.primary_conv[2]), gate, concat=concat)


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

    def stored(self, channels: Channels) -> nn.Module:
        """Return the deploy form on a stored map."""
        hidden = Channels.joined(self.conv_reduce.out_channels, 1)
        reduce, expand = store(self.conv_reduce, channels, hidden), store(self.conv_expand, hidden, channels)
        return Scaled(nn.Sequential(nn.AdaptiveAvgPool2d(1), reduce, nn.ReLU(), expand, nn.Hardsigmoid()))


class Bottleneck(nn.Module):
    """Ghost module up, depthwise convolution if strided, squeeze-excite, ghost module down, plus the shortcut."""

    def __init__(self, inputs: int, mid: int, outputs: int, kernel: int, stride: int, *, se: bool, gated: bool) -> None:
        super().__init__()
        square = (kernel, kernel)
        self.ghost1 = GhostModule(inputs, mid, relu=True, gated=gated)
        if stride > 1:
            self.conv_dw, self.bn_dw = _conv_norm(mid, mid, square, stride, mid)
        self.se = SqueezeExcite(mid) if se else nn.Identity()
        self.ghost2 = GhostModule(mid, outputs, relu=False, gated=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.extend(_conv_norm(inputs, inputs, square, stride, inputs))
            self.shortcut.extend(_conv_norm(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, ceil(h / stride), ceil(w / stride)]."""
        inner = self.ghost1(x)
        if hasattr(self, "conv_dw"):
            inner = self.bn_dw(self.conv_dw(inner))
        out: Tensor = self.ghost2(self.se(inner)) + self.shortcut(x)
        return out

    def stored(self, inputs: Channels, align: int) -> tuple[nn.Module, Channels]:
        """Return the deploy form on a stored map, and how its output is stored."""
        mid = self.ghost1.channels(align)
        outputs = self.ghost2.channels(align) if self.shortcut else inputs
        inner = [self.ghost1.stored(inputs, mid, align)]
        if hasattr(self, "conv_dw"):
            inner.append(store(fuse_conv_norm(self.conv_dw, self.bn_dw), mid, mid))
        if isinstance(self.se, SqueezeExcite):
            inner.append(self.se.stored(mid))
        inner.append(self.ghost2.stored(mid, outputs, align))
        shortcut = [store(conv, inputs, inputs if conv.groups > 1 else outputs) for conv in folded(self.shortcut)]
        return Summed(nn.Sequential(*inner), nn.Sequential(*shortcut)), outputs


class ConvNormAct(nn.Module):
    """Pointwise convolution, norm, ReLU: the last block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn1 = _conv_norm(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        return F.relu(self.bn1(self.conv(x)))

    def stored(self, inputs: Channels, align: int) -> tuple[nn.Module, Channels]:
        """Return the deploy form on a stored map, and how its output is stored."""
        outputs = Channels.joined(self.conv.out_channels, 1)
        return nn.Sequential(store(fuse_conv_norm(self.conv, self.bn1), inputs, outputs), nn.ReLU()), outputs


class GhostNetV2(nn.Module):
    """The network at `scale` times the widths of the table."""

    def __init__(self, scale: float, classes: int = 1000) -> None:
        super().__init__()
        width, mid = _round(16 * scale), 0
        self.conv_stem, self.bn1 = _conv_norm(3, width, (3, 3), 2)
        self.act1 = nn.ReLU()
        stages: list[nn.Module] = []
        for position, stage in enumerate(_STAGES):
            blocks = []
            for kernel, inner, outer, se, stride in stage:
                inputs, mid, width = width, _round(inner * scale), _round(outer * scale)
                blocks.append(Bottleneck(inputs, mid, width, kernel, stride, se=se, gated=position > 1))
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages, nn.Sequential(ConvNormAct(width, mid)))
        self.conv_head = nn.Conv2d(mid, 1280, 1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images [b, 3, h, w] to logits [b, classes]."""
        x = self.blocks(self.act1(self.bn1(self.conv_stem(image))))
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        logits: Tensor = self.classifier(F.dropout(x.flatten(1), 0.2, self.training))
        return logits

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the exact inference form, its maps stored at channel counts that are multiples of `align`."""
        channels = Channels.joined(self.conv_stem.out_channels, align)
        stem = store(fuse_conv_norm(self.conv_stem, self.bn1), Channels.joined(3, 1), channels)
        layers: list[nn.Module] = [stem, nn.ReLU()]
        for block in self.blocks.modules():
            if isinstance(block, Bottleneck | ConvNormAct):
                layer, channels = block.stored(channels, align)
                layers.append(layer)
        head = [nn.AdaptiveAvgPool2d(1), copy.deepcopy(self.conv_head), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, *head, copy.deepcopy(self.classifier)).eval()


class StoredGhost(nn.Module):
    """Deploy form of a ghost module; without `concat` the depthwise convolution passes the first half through."""

    def __init__(
        self, primary: nn.Module, cheap: nn.Module, act: nn.Module, gate: list[nn.Conv2d], *, concat: bool
    ) -> None:
        super().__init__()
        self.concat = concat
        self.primary = nn.Sequential(primary, act)
        self.cheap = nn.Sequential(cheap, act)
        self.gate = nn.Sequential(nn.AvgPool2d(2), *gate) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Map a stored map to a stored map of the same size."""
        primary = self.primary(x)
        out: Tensor = self.cheap(primary)
        if self.concat:
            out = torch.cat([primary, out], 1)
        return out if self.gate is None else upsample_gate_mul.op(out, self.gate(x))


class Scaled(nn.Module):
    """x gate(x)."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape."""
        scaled: Tensor = x * self.gate(x)
        return scaled


class Summed(nn.Module):
    """inner(x) + shortcut(x)."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to the sum of both branches."""
        total: Tensor = self.inner(x) + self.shortcut(x)
        return total


def _round(value: float) -> int:
    """Return the multiple of 4 nearest to `value`, or the next one where that loses more than a tenth."""
    rounded = max(4, int(value + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * value else rounded


def _conv_norm(
    inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution, padded so that only its stride changes the size, and its norm."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


# One line per stage of bottlenecks: kernel, inner width, width, squeeze-excite, stride. From the third bottleneck on
# the first ghost module is gated.
_STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    ((3, 200, 80, False, 1), *[(3, 184, 80, False, 1)] * 2, *[(3, mid, 112, True, 1) for mid in (480, 672)]),
    ((5, 672, 160, True, 2),),
    tuple((5, 960, 160, se, 1) for se in (False, True, False, True)),
)
# scale, file, parameters, MACs, top-1
_VARIANTS = (
    (1.0, "10", 6_156_908, 167_048_288, 75.3),
    (1.3, "13", 8_960_404, 269_322_976, 76.9),
    (1.6, "16", 12_392_698, 398_607_224, 77.8),
)
_RELEASE = "https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/GhostNetV2"

for _scale, _file, _parameters, _macs, _top1 in _VARIANTS:
    register(
        Model(
            name=f"ghostnetv2_{_scale}",
            family="ghostnetv2",
            build=functools.partial(GhostNetV2, _scale),
            inputs=image(224),
            parameters=_parameters,
            macs=_macs,
            paper="GhostNetV2: Enhance Cheap Operation with Long-Range Attention (NeurIPS 2022)",
            source="huawei-noah/Efficient-AI-Backbones",
            top1=_top1,
            checkpoint=Checkpoint(f"{_RELEASE}/ck_ghostnetv2_{_file}.pth.tar", ignore=("total_ops", "total_params")),
        )
    )
