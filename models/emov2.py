"""EMOv2: inverted residual blocks whose expansion is a convolution, or attention in remote and close windows at once.

Paper: Zhang et al., "EMOv2: Pushing 5M Vision Model Frontier", 2024. Source: github.com/zhangzjn/EMOv2.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.kernels import hybrid_window_attention
from edgeattn.model import Checkpoint, Model, image, register
from edgeattn.models._channels import Channels, store
from edgeattn.models._layers import fuse_conv_norm, norm_affine

_EPS = 1e-6


class ConvNormAct(nn.Sequential):
    """Convolution, then batch norm and an activation where asked for."""

    conv: nn.Conv2d

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        norm: bool = False,
        act: nn.Module | None = None,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - stride + 1) // 2, groups=groups, bias=bias)
        batch_norm = nn.BatchNorm2d(outputs, eps=_EPS) if norm else None
        parts = {"conv": conv, "norm": batch_norm, "act": act}
        super().__init__(OrderedDict((name, part) for name, part in parts.items() if part is not None))

    def folded(self) -> nn.Sequential:
        """Return the convolution, the norm folded into it, and the activation."""
        parts = dict(self.named_children())
        norm = parts.pop("norm", None)
        parts["conv"] = fuse_conv_norm(self.conv, norm) if isinstance(norm, nn.BatchNorm2d) else self.conv
        return nn.Sequential(OrderedDict(parts))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel."""

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        return x * self.gamma


class Expansion(nn.Module):
    """Pointwise convolution and activation."""

    def __init__(self, inputs: int, outputs: int, act: nn.Module) -> None:
        super().__init__()
        self.net = ConvNormAct(inputs, outputs, bias=True, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]."""
        out: Tensor = self.net(x)
        return out

    def stored(self, align: int) -> Channels:
        """Return where the deploy form keeps the outputs."""
        return Channels.joined(self.net.conv.out_channels, align)

    def after(self, norm: nn.Module, outputs: Channels) -> tuple[nn.Module, nn.Module]:
        """Return what is left of the norm before this layer, and the layer with the norm's affine part folded in."""
        scale, shift, rest = _split_norm(norm)
        form = copy.deepcopy(self)
        form.net.conv = store(_after_affine(self.net.conv, scale, shift), Channels.joined(len(scale), 1), outputs)
        return rest, form


class QueryKey(nn.Module):
    """One pointwise convolution for queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [b, width, h, w] to two maps of that shape."""
        q, k = self.conv(x).chunk(2, 1)
        return q, k


class SeparateQueryKey(nn.Module):
    """The deploy form of `QueryKey`: two convolutions, queries times `scale`.

    The keys lose their bias: it adds the same to all scores of a query, padded keys included, which softmax ignores.
    """

    def __init__(self, joint: nn.Conv2d, scale: float) -> None:
        super().__init__()
        assert joint.bias is not None
        self.q = nn.Conv2d(joint.in_channels, joint.in_channels, 1)
        self.k = nn.Conv2d(joint.in_channels, joint.in_channels, 1, bias=False)
        q, k = joint.weight.detach().chunk(2)
        self.q.weight, self.q.bias = nn.Parameter(scale * q), nn.Parameter(scale * joint.bias.detach().chunk(2)[0])
        self.k.weight = nn.Parameter(k.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [b, width, h, w] to two maps of that shape."""
        return self.q(x), self.k(x)


class HybridAttention(nn.Module):
    """Attention in remote and close windows; the values widen the map and pass an activation first."""

    def __init__(self, inputs: int, outputs: int, head_width: int, window: int, act: nn.Module) -> None:
        super().__init__()
        self.heads, self.window, self.scale = inputs // head_width, window, head_width**-0.5
        self.qk: QueryKey | SeparateQueryKey = QueryKey(inputs)
        self.v = ConvNormAct(inputs, outputs, bias=True, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w]; pixels added to fill the windows take part, unmasked."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.window, 0, -height % self.window))
        q, k = self.qk(x)
        window = [self.window, self.window]
        out = hybrid_window_attention.op(q, k, self.v(x), num_heads=self.heads, window=window, scale=self.scale)
        return _crop(out, height, width)

    def stored(self, align: int) -> Channels:
        """Return where the deploy form keeps the outputs: every head as wide as makes their sum a multiple."""
        width = wide = self.v.conv.out_channels // self.heads
        while self.heads * wide % align:
            wide += 1
        return Channels(tuple(head * wide + i for head in range(self.heads) for i in range(width)), self.heads * wide)

    def after(self, norm: nn.Module, outputs: Channels) -> tuple[nn.Module, nn.Module]:
        """Return the norm before this layer as it is, and the layer with its scale folded in.

        Folding the norm's shift would also shift the padded pixels, which are zero after the norm; folding its gain
        alone would divide the shift by it. The norm operator takes both anyway.
        """
        assert isinstance(self.qk, QueryKey)
        form = copy.deepcopy(self)
        form.qk, form.scale = SeparateQueryKey(self.qk.conv, self.scale), 1.0
        form.v.conv = store(self.v.conv, Channels.joined(self.v.conv.in_channels, 1), outputs)
        return copy.deepcopy(norm), form


def _crop(x: Tensor, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    if isinstance(height, int) and isinstance(width, int):
        return x[:, :, :height, :width]
    # Of a slice with symbolic sizes the tracer asks whether it is contiguous, and fixes the sizes by the answer.
    missing: Any = (0, width - x.shape[3], 0, height - x.shape[2])
    return F.pad(x, missing)


class Block(nn.Module):
    """Norm, expansion, depthwise convolution and projection; with stride 1 a skip around the last two and the whole.

    `head_width` 0 expands by a plain convolution. The early stages use batch norm and SiLU, the late ones layer norm
    and GELU.
    """

    def __init__(
        self, inputs: int, outputs: int, ratio: float, stride: int, *, late: bool, head_width: int = 0, window: int = 0
    ) -> None:
        super().__init__()
        self.skip = stride == 1
        middle, act = int(inputs * ratio), nn.GELU() if late else nn.SiLU()
        self.norm = ChannelNorm(inputs) if late else nn.BatchNorm2d(inputs, eps=_EPS)
        attend = HybridAttention(inputs, middle, head_width, window, act) if head_width else None
        self.eops = nn.ModuleList([attend or Expansion(inputs, middle, act)])
        self.conv_local = ConvNormAct(middle, middle, 5, stride, middle, norm=True, act=nn.SiLU())
        self.proj = ConvNormAct(middle, outputs)
        self.ls = LayerScale(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, h, w], or half that size with stride 2."""
        wide = self.eops[0](self.norm(x))
        local = self.conv_local(wide)
        out: Tensor = self.ls(self.proj(wide + local if self.skip else local))
        return x + out if self.skip else out

    def folded(self, align: int) -> FoldedBlock:
        """Return the deploy form of a float64 block, its inner channels padded to a multiple of `align`."""
        expand = self.eops[0]
        assert isinstance(expand, Expansion | HybridAttention)
        inner, outputs = expand.stored(align), Channels.joined(self.proj.conv.out_channels, 1)
        local, act = self.conv_local.folded()
        assert isinstance(local, nn.Conv2d)
        project = store(_scaled(self.proj.conv, self.ls.gamma.detach().flatten()), inner, outputs)
        return FoldedBlock(*expand.after(self.norm, inner), store(local, inner, inner), act, project, self.skip)


class FoldedBlock(nn.Module):
    """The deploy form of `Block`: norms, scales and the layer scale are part of the convolutions."""

    def __init__(
        self, norm: nn.Module, expand: nn.Module, local: nn.Conv2d, act: nn.Module, project: nn.Conv2d, skip: bool
    ) -> None:
        super().__init__()
        self.norm, self.expand, self.local, self.act, self.project = norm, expand, local, act, project
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Map as the block does."""
        wide = self.expand(self.norm(x))
        local = self.act(self.local(wide))
        out: Tensor = self.project(wide + local if self.skip else local)
        return x + out if self.skip else out


class EMOv2(nn.Module):
    """Stem of stride 2, four stages that halve the map, norm, mean over the map, classifier."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        ratios: tuple[float, ...],
        head_width: int,
        window: int,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        width = widths[0] // 2
        self.stage0 = nn.Sequential(
            ConvNormAct(3, width, 3, 2, bias=True, norm=True, act=nn.SiLU()),
            ConvNormAct(width, width, 3, 1, width, norm=True, act=nn.SiLU()),
            ConvNormAct(width, width),
        )
        for stage, (depth, outputs, ratio) in enumerate(zip(depths, widths, ratios, strict=True)):
            late = stage >= 2
            blocks = [Block(width, outputs, 2 * ratio, 2, late=late)]
            heads = {"head_width": head_width, "window": window} if late else {}
            blocks += [Block(outputs, outputs, ratio, 1, late=late, **heads) for _ in range(depth - 1)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
            width = outputs
        self.norm: nn.Module = ChannelNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images [b, 3, h, w] to logits [b, classes]."""
        x = image
        for stage in range(5):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.head(self.norm(x).mean((2, 3)))
        return logits

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the exact inference form, folded in float64; inner channels are padded to a multiple of `align`."""
        form = copy.deepcopy(self).eval().double()
        *stem, last = (part for part in form.stage0 if isinstance(part, ConvNormAct))
        form.stage0 = nn.Sequential(*(part.folded() for part in stem))
        for stage in range(1, 5):
            blocks = form.get_submodule(f"stage{stage}").children()
            folded = [block.folded(align) for block in blocks if isinstance(block, Block)]
            if stage == 1:
                _prepend(last.conv, folded[0].expand)
            form.add_module(f"stage{stage}", nn.Sequential(*folded))
        scale, shift, form.norm = _split_norm(form.norm)
        weight, bias = form.head.weight.detach(), form.head.bias.detach()
        form.head.weight, form.head.bias = nn.Parameter(weight * scale), nn.Parameter(bias + weight @ shift)
        return form.to(self.head.weight.dtype)


def _prepend(linear: nn.Conv2d, expand: nn.Module) -> None:
    """Make the first layer of `expand` take what the pointwise convolution `linear`, without bias, takes."""
    assert isinstance(expand, Expansion)
    conv = expand.net.conv
    conv.weight = nn.Parameter(torch.einsum("omyx,miyx->oiyx", conv.weight.detach(), linear.weight.detach()))


def _split_norm(norm: nn.Module) -> tuple[Tensor, Tensor, nn.Module]:
    """Return scale and shift of a norm, and the norm without them."""
    if isinstance(norm, ChannelNorm):
        scale, shift = norm.norm.weight.detach(), norm.norm.bias.detach()
        return scale, shift, ChannelNorm(len(scale), affine=False)
    assert isinstance(norm, nn.BatchNorm2d)
    return *norm_affine(norm), nn.Identity()


def _after_affine(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """Return a pointwise convolution equal to `conv(scale * x + shift)`."""
    assert conv.bias is not None
    weight = conv.weight.detach()
    return _with(conv, weight * scale.reshape(1, -1, 1, 1), conv.bias.detach() + weight[:, :, 0, 0] @ shift)


def _scaled(conv: nn.Conv2d, gamma: Tensor) -> nn.Conv2d:
    """Return a convolution equal to `gamma * conv(x)`, with a bias of zero."""
    return _with(conv, conv.weight.detach() * gamma.reshape(-1, 1, 1, 1), torch.zeros_like(gamma))


def _with(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made = copy.deepcopy(conv)
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


@dataclass(frozen=True)
class _Size:
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    head_width: int
    parameters: int


_SMALL, _LARGE = (2.0, 2.5, 3.0, 3.5), (2.0, 3.0, 4.0, 4.0)
_SIZES = {
    "1m": _Size((2, 2, 8, 3), (32, 48, 80, 180), _SMALL, 20, 1_460_844),
    "2m": _Size((3, 3, 9, 3), (32, 48, 120, 200), _SMALL, 20, 2_384_312),
    "5m": _Size((3, 3, 9, 3), (48, 72, 160, 288), _LARGE, 32, 5_126_440),
    "20m": _Size((3, 3, 13, 3), (64, 128, 320, 448), _LARGE, 32, 20_195_208),
    "50m": _Size((5, 8, 20, 7), (64, 128, 384, 512), _LARGE, 32, 49_815_560),
}
# size, input, MACs, top-1 as published without distillation (the 512 model: stronger recipe), released file
_VARIANTS = (
    ("1m", 224, 279_936_484, 72.3, "EMOv2_1M_224"),
    ("2m", 224, 480_811_600, 75.8, "EMOv2_2M_224"),
    ("5m", 224, 1_025_113_984, 79.4, "EMOv2_5M_224"),
    ("20m", 224, 3_997_004_032, None, ""),
    ("50m", 224, 8_767_262_720, None, ""),
    ("1m", 256, 385_889_824, None, ""),
    ("2m", 256, 660_884_800, None, ""),
    ("5m", 256, 1_393_517_824, None, ""),
    ("20m", 256, 5_376_497_152, None, ""),
    ("1m", 512, 1_543_019_296, None, ""),
    ("2m", 512, 2_642_939_200, None, ""),
    ("5m", 512, 5_573_207_296, 82.9, "EMOv2_5M_512"),
)
_RELEASE = "https://github.com/zhangzjn/data/raw/main/emov2_pretrained_weights"

for _size, _pixels, _macs, _top1, _file in _VARIANTS:
    _shape = _SIZES[_size]
    _window = 7 if _pixels == 224 else 8
    register(
        Model(
            name=f"emov2_{_size}" + (f"_{_pixels}" if _pixels != 224 else ""),
            family="emov2",
            build=functools.partial(EMOv2, _shape.depths, _shape.widths, _shape.ratios, _shape.head_width, _window),
            inputs=image(_pixels),
            parameters=_shape.parameters,
            macs=_macs,
            paper="EMOv2: Pushing 5M Vision Model Frontier (2024)",
            source="zhangzjn/EMOv2",
            top1=_top1,
            checkpoint=Checkpoint(f"{_RELEASE}/{_file}.pth" if _file else "", ("net_E", "net")),
        )
    )
