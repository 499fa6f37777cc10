"""SHViT: single-head attention on a part of the channels, after a stem of stride 16.

Paper: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024.
Source: github.com/ysj9909/SHViT.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.kernels import single_head_attention
from edgeattn.model import Checkpoint, Model, image, register
from edgeattn.models._layers import (
    ConvNorm,
    FeedForward,
    Residual,
    ThreeStages,
    depthwise,
    fold,
    fuse_conv_norm,
    set_weights,
)

_KEY_WIDTH = 16


class SingleHeadAttention(nn.Module):
    """Attention on the first `partial` channels, the others passed by, then ReLU and a projection of all."""

    def __init__(self, width: int, partial: int) -> None:
        super().__init__()
        self.widths = [partial, width - partial]
        self.pre_norm = nn.GroupNorm(1, partial)
        self.qkv = ConvNorm(partial, 2 * _KEY_WIDTH + partial)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        batch, _, height, wide = x.shape
        attended, passed = x.split(self.widths, 1)
        qkv = self.qkv(self.pre_norm(attended)).flatten(2)
        q, k, v = qkv.split([_KEY_WIDTH, _KEY_WIDTH, self.widths[0]], 1)
        attended = single_head_attention.op(q, k, v, scale=_KEY_WIDTH**-0.5).reshape(batch, -1, height, wide)
        mixed: Tensor = self.proj(torch.cat([attended, passed], 1))
        return mixed

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the same without norms: their affine parts and the softmax scale are in the convolutions."""
        return _Deployed(self)


class _Deployed(nn.Module):
    """Single-head attention with plain convolutions; the group norm keeps its statistics only."""

    def __init__(self, original: SingleHeadAttention) -> None:
        super().__init__()
        self.widths = original.widths
        self.eps = original.pre_norm.eps
        self.qkv = _fold_affine(original)
        self.proj = fold(original.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        batch, _, height, wide = x.shape
        attended, passed = x.split(self.widths, 1)
        # One group over the whole sample is a layer norm over all axes but the batch: one node, no reshapes.
        normed = functional.layer_norm(attended, attended.shape[1:], eps=self.eps)
        q, k, v = self.qkv(normed).flatten(2).split([_KEY_WIDTH, _KEY_WIDTH, self.widths[0]], 1)
        attended = single_head_attention.op(q, k, v, scale=1.0).reshape(batch, -1, height, wide)
        mixed: Tensor = self.proj(torch.cat([attended, passed], 1))
        return mixed


def _fold_affine(original: SingleHeadAttention) -> nn.Conv2d:
    """Return the q, k, v convolution that also does the affine part of the norm ahead and the scale of the softmax."""
    conv, norm = original.qkv.c, original.pre_norm
    wide = fuse_conv_norm(copy.deepcopy(conv).double(), original.qkv.bn)
    assert wide.bias is not None
    bias = wide.bias.detach() + wide.weight.detach()[:, :, 0, 0] @ norm.bias.detach().double()
    weight = wide.weight.detach() * norm.weight.detach().double().reshape(1, -1, 1, 1)
    scale = torch.ones_like(bias)
    scale[:_KEY_WIDTH] = _KEY_WIDTH**-0.5
    return set_weights(wide.to(conv.weight), weight * scale.reshape(-1, 1, 1, 1), bias * scale)


class Block(nn.Module):
    """Depthwise convolution, single-head attention and feed-forward, each with a skip."""

    def __init__(self, width: int, partial: int = 0) -> None:
        super().__init__()
        self.conv = depthwise(width)
        self.mixer = Residual(SingleHeadAttention(width, partial)) if partial else nn.Identity()
        self.ffn = Residual(FeedForward(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = self.ffn(self.mixer(self.conv(x)))
        return out


def _shvit(widths: tuple[int, ...], depths: tuple[int, ...], partials: tuple[int, ...]) -> nn.Module:
    return ThreeStages(widths, depths, lambda stage, width: Block(width, partials[stage]))


# name, input size, widths, depths, attention channels (none in the first stage), parameters, MACs, top-1
_VARIANTS = (
    ("shvit_s1", 224, (128, 224, 320), (2, 4, 5), (0, 48, 68), 6_330_808, 241_320_768, 72.8),
    ("shvit_s2", 224, (128, 308, 448), (2, 4, 5), (0, 66, 96), 11_483_072, 365_394_896, 75.2),
    ("shvit_s3", 224, (192, 352, 448), (3, 5, 5), (0, 75, 96), 14_245_273, 600_570_164, 77.4),
    ("shvit_s4", 256, (224, 336, 448), (4, 7, 6), (0, 72, 96), 16_588_484, 986_216_960, 79.4),
)

for _name, _size, _widths, _depths, _partials, _parameters, _macs, _top1 in _VARIANTS:
    register(
        Model(
            name=_name,
            family="shvit",
            build=functools.partial(_shvit, _widths, _depths, _partials),
            inputs=image(_size, resize=256 * _size // 224),
            parameters=_parameters,
            macs=_macs,
            paper="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (CVPR 2024)",
            source="ysj9909/SHViT",
            top1=_top1,
            checkpoint=Checkpoint(
                f"https://github.com/ysj9909/SHViT/releases/download/v1.0/{_name}.pth", ("model", "state_dict")
            ),
        )
    )
