"""Layers shared by the model families: convolution with norm and its exact fusion, squeeze-excite, three-stage frame.

A module with a deploy form of its own has `deploy(align) -> nn.Module`; `fold` applies these to a whole tree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift in float64, so that `norm(x) = scale * x + shift` in eval mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a norm without running statistics cannot be folded")
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def set_weights(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """Give `layer` these weights, in the dtype and on the device it has; return it in eval mode."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    layer.eval()
    return layer


def fuse_conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, *, skip: bool = False) -> nn.Conv2d:
    """Return one convolution with bias equal to `norm(conv(x))`, or to `x + norm(conv(x))` with `skip`.

    Computed in float64 and cast to the dtype of the convolution. `skip` is for depthwise convolutions that keep the
    size, whose centre tap takes the identity.
    """
    scale, shift = norm_affine(norm)
    weight = conv.weight.detach().double() * scale.reshape(-1, 1, 1, 1)
    if skip:
        weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    bias = shift if conv.bias is None else shift + scale * conv.bias.detach().double()
    fused = copy.deepcopy(conv)
    fused.bias = nn.Parameter(torch.empty_like(fused.weight[:, 0, 0, 0]))
    return set_weights(fused, weight, bias)


def fold(module: nn.Module, align: int = 1) -> nn.Module:
    """Return the deploy form of `module`: its own, or a copy whose submodules are replaced by theirs; eval mode."""
    deploy: Callable[[int], nn.Module] | None = getattr(module, "deploy", None)
    return deploy(align) if deploy else fold_children(module, align)


def fold_children(module: nn.Module, align: int = 1) -> nn.Module:
    """Return a copy of `module` whose submodules are replaced by their deploy forms, in eval mode."""
    folded = copy.deepcopy(module).eval()
    for name, child in module.named_children():
        setattr(folded, name, fold(child, align))
    return folded


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h', w']."""
        normed: Tensor = self.bn(self.c(x))
        return normed

    def deploy(self, align: int = 1) -> nn.Module:
        """Return one convolution with bias."""
        return fuse_conv_norm(self.c, self.bn)


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape."""
        total: Tensor = x + self.m(x)
        return total

    def deploy(self, align: int = 1) -> nn.Module:
        """Return one convolution if the branch is depthwise, else the sum with the branch's deploy form."""
        if isinstance(self.m, ConvNorm) and self.m.c.groups == self.m.c.in_channels == self.m.c.out_channels:
            return fuse_conv_norm(self.m.c, self.m.bn, skip=True)
        return Residual(fold(self.m, align)).eval()


class FeedForward(nn.Module):
    """Two pointwise convolutions with twice the width between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(width, 2 * width)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = self.pw2(self.act(self.pw1(x)))
        return out


class SqueezeExcite(nn.Module):
    """Per-channel gate from the spatial mean; the hidden width is a multiple of 8 near a quarter of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(8, (width // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, width, 1)
        self.blocked = False

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        gate: Tensor = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        if self.blocked and isinstance(x.shape[2], int) and isinstance(x.shape[3], int):
            gate = functional.interpolate(gate, scale_factor=(float(x.shape[2]), float(x.shape[3])))
        return x * gate

    def deploy(self, align: int = 1) -> nn.Module:
        """Return a copy; where channels are blocked, the gate is enlarged to the map if its size is fixed.

        ONNX Runtime multiplies in its blocked layout only maps of one size; a broadcast costs three reorders.
        """
        folded = copy.deepcopy(self).eval()
        folded.blocked = align > 1
        return folded


class Merge(nn.Module):
    """Halve the map and change the width: inverted bottleneck with a strided depthwise convolution and a gate."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.conv1 = ConvNorm(inputs, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, 2, 1, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvNorm(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, ceil(h / 2), ceil(w / 2)]."""
        x = self.act(self.conv2(self.act(self.conv1(x))))
        out: Tensor = self.conv3(self.se(x))
        return out


class NormLinear(nn.Module):
    """Batch norm and a linear layer: the classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.l = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width] to [b, classes]."""
        logits: Tensor = self.l(self.bn(x))
        return logits

    def deploy(self, align: int = 1) -> nn.Module:
        """Return one linear layer."""
        scale, shift = norm_affine(self.bn)
        weight = self.l.weight.detach().double()
        return set_weights(copy.deepcopy(self.l), weight * scale, self.l.bias.detach().double() + weight @ shift)


class ThreeStages(nn.Module):
    """The frame of SHViT and MobileMamba: a stem of stride 16, three stages of blocks, and a linear classifier.

    `block(stage, width)` builds one block of stage 0, 1 or 2.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], block: Callable[[int, int], nn.Module], classes: int = 1000
    ) -> None:
        super().__init__()
        self.patch_embed = _stem(widths[0])
        self.blocks1 = nn.Sequential(*(block(0, widths[0]) for _ in range(depths[0])))
        self.blocks2 = nn.Sequential(*_between(widths[0], widths[1]), *(block(1, widths[1]) for _ in range(depths[1])))
        self.blocks3 = nn.Sequential(*_between(widths[1], widths[2]), *(block(2, widths[2]) for _ in range(depths[2])))
        self.head = NormLinear(widths[2], classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images [b, 3, h, w] to logits [b, classes]."""
        x = self.blocks3(self.blocks2(self.blocks1(self.patch_embed(image))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the exact inference form; split channels are padded to a multiple of `align`."""
        return fold_children(self, align)


def _stem(width: int) -> nn.Sequential:
    """Four 3x3 convolutions of stride 2, doubling the width up to `width`, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width // 8), (width // 8, width // 4), (width // 4, width // 2), (width // 2, width)):
        layers += [ConvNorm(inputs, outputs, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _between(inputs: int, outputs: int) -> list[nn.Module]:
    """Depthwise convolution and feed-forward on either side of the downsampling."""
    return [_mix(inputs), Merge(inputs, outputs), _mix(outputs)]


def _mix(width: int) -> nn.Sequential:
    return nn.Sequential(depthwise(width), Residual(FeedForward(width)))


def depthwise(width: int) -> Residual:
    """Return x + norm(depthwise 3x3 convolution of x)."""
    return Residual(ConvNorm(width, width, 3, 1, 1, groups=width))
