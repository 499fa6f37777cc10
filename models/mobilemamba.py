"""MobileMamba: selective scan with a wavelet branch, multi-kernel depthwise convolutions and identity channels."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.kernels import haar_dwt, haar_idwt, selective_scan
from edgeattn.kernels._haar import filters
from edgeattn.model import Checkpoint, Model, image, register
from edgeattn.models._channels import Channels, store
from edgeattn.models._layers import (
    ConvNorm,
    FeedForward,
    Residual,
    ThreeStages,
    depthwise,
    fold,
    fold_children,
    fuse_conv_norm,
    set_weights,
)

_GLOBAL_RATIO = (0.8, 0.7, 0.6)
_LOCAL_RATIO = (0.2, 0.2, 0.3)
_KERNEL = (7, 5, 3)
_DIRECTIONS = [0, 1]  # row-major, and the same sequence reversed


class Scan2d(nn.Module):
    """Mamba block over the pixels of a map: two opposite scans, state size 1, inner width twice the outer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        rank = -(-width // 16)
        self.widths = [rank, 1, 1]
        self.x_proj_weight = nn.Parameter(torch.randn(2, sum(self.widths), inner) * inner**-0.5)
        self.Ds = nn.Parameter(torch.ones(2 * inner))
        self.A_logs = nn.Parameter(torch.zeros(2 * inner, 1))
        self.dt_projs_weight = nn.Parameter(torch.randn(2, inner, rank) * rank**-0.5)
        self.dt_projs_bias = nn.Parameter(torch.full((2, inner), -4.0))
        self.out_norm = nn.LayerNorm(inner)
        self.in_proj = ConvNorm(width, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_proj = ConvNorm(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        x, gate = self.in_proj(x).chunk(2, 1)
        y = self.scan(F.silu(self.conv2d(x)))
        out: Tensor = self.out_proj(y * F.silu(gate))
        return out

    def scan(self, x: Tensor) -> Tensor:
        """Scan the pixels of x [b, inner, h, w] both ways and normalise over channels, in float32 at least.

        The scan is cubic in x: its sum leaves the range of float16 while x is far inside, and so it did in the authors'
        code, which leaves it in float32 under autocast.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens = x.flatten(2).unsqueeze(1)  # [b, 1, inner, l]
        codes, enter, leave = (self.x_proj_weight @ tokens).split(self.widths, 2)
        y = selective_scan.op(
            tokens.to(wide),
            (self.dt_projs_weight @ codes).to(wide),
            -torch.exp(self.A_logs.to(wide)).unflatten(0, (2, -1)),
            enter.to(wide),
            leave.to(wide),
            self.Ds.to(wide).unflatten(0, (2, -1)),
            self.dt_projs_bias.to(wide),
            directions=_DIRECTIONS,
            delta_softplus=1,
        )
        norm = self.out_norm
        weight, bias = norm.weight.to(wide), norm.bias.to(wide)
        normed = F.layer_norm(y.transpose(1, 2), norm.normalized_shape, weight, bias, norm.eps)
        return normed.transpose(1, 2).reshape(x.shape).to(x.dtype)


class ScanTokens(nn.Module):
    """Deploy form of `Scan2d`, times `scale` per channel: between the convolutions a token is a row."""

    def __init__(self, scan: Scan2d, scale: Tensor) -> None:
        super().__init__()
        inner = scan.conv2d.in_channels
        entry = fuse_conv_norm(scan.in_proj.c, scan.in_proj.bn)
        self.widths = scan.widths
        self.enter, self.gate = _rows(entry, slice(0, inner)), _rows(entry, slice(inner, None))
        self.mix = copy.deepcopy(scan.conv2d)
        self.project = nn.Parameter(scan.x_proj_weight.detach().transpose(1, 2).contiguous())  # [2, inner, r + 2]
        self.expand = nn.Parameter(scan.dt_projs_weight.detach().transpose(1, 2).contiguous())  # [2, r, inner]
        rate = -torch.exp(scan.A_logs.detach().double()).unflatten(0, (2, -1))
        self.rate = nn.Parameter(rate.to(scan.A_logs.dtype))
        self.skip = nn.Parameter(scan.Ds.detach().unflatten(0, (2, -1)).clone())
        self.offset = nn.Parameter(scan.dt_projs_bias.detach().clone())
        self.norm = copy.deepcopy(scan.out_norm)
        self.leave = _scaled(fuse_conv_norm(scan.out_proj.c, scan.out_proj.bn), scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        tokens = F.silu(_tokens(self.mix(self.enter(x))))  # [b, l, inner]
        codes, enter, leave = (tokens.unsqueeze(1) @ self.project).split(self.widths, -1)  # [b, 2, l, r or 1]
        y = selective_scan.op(
            tokens.transpose(1, 2).unsqueeze(1),
            (codes @ self.expand).transpose(2, 3),
            self.rate,
            enter.transpose(2, 3),
            leave.transpose(2, 3),
            self.skip,
            self.offset,
            directions=_DIRECTIONS,
            delta_softplus=1,
        )
        y = self.norm(y.transpose(1, 2)) * F.silu(_tokens(self.gate(x)))
        out: Tensor = self.leave(y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))
        return out


def _tokens(x: Tensor) -> Tensor:
    """Lay the pixels of a map [b, c, h, w] out as rows, [b, h w, c]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _rows(conv: nn.Conv2d, rows: slice) -> nn.Conv2d:
    """Return a pointwise convolution with some of the outputs of `conv`."""
    assert conv.bias is not None
    weight, bias = conv.weight[rows], conv.bias[rows]
    like = nn.Conv2d(conv.in_channels, len(bias), 1).to(weight)
    return set_weights(like, weight, bias)


def _scaled(conv: nn.Conv2d, scale: Tensor) -> nn.Conv2d:
    """Return a convolution with every output multiplied by its factor in `scale`, [1, outputs, 1, 1]."""
    factor = scale.detach().double().flatten()
    bias = torch.zeros_like(factor) if conv.bias is None else conv.bias.detach().double() * factor
    weight = conv.weight.detach().double() * factor.reshape(-1, 1, 1, 1)
    return set_weights(copy.deepcopy(conv), weight, bias)


class Scale(nn.Module):
    """One factor per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, width, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        return self.weight * x


class WaveletScan(nn.Module):
    """Global branch: the scan, plus a depthwise convolution of the Haar sub-bands."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        # The authors store the fixed Haar filters; the ops know them.
        self.wt_filter = nn.Parameter(filters(width, torch.empty(0)), requires_grad=False)
        self.iwt_filter = nn.Parameter(filters(width, torch.empty(0)), requires_grad=False)
        self.global_atten = Scan2d(width, 2 * width)
        self.base_scale = Scale(width, 1.0)
        bands = nn.Conv2d(4 * width, 4 * width, kernel, padding=kernel // 2, groups=4 * width, bias=False)
        self.wavelet_convs = nn.ModuleList([bands])
        self.wavelet_scale = nn.ModuleList([Scale(4 * width, 0.1)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        base = self.base_scale(self.global_atten(x))
        bands = self.wavelet_scale[0](self.wavelet_convs[0](haar_dwt.op(x)))
        out: Tensor = haar_idwt.op(bands, base)
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form with `base_scale` and `wavelet_scale` in the weights."""
        return ScanAndBands(self)


class ScanAndBands(nn.Module):
    """Deploy form of `WaveletScan`."""

    def __init__(self, branch: WaveletScan) -> None:
        super().__init__()
        self.scan = ScanTokens(branch.global_atten, branch.base_scale.weight)
        conv, scale = branch.wavelet_convs[0], branch.wavelet_scale[0]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(scale, Scale)
        self.bands = _scaled(conv, scale.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = haar_idwt.op(self.bands(haar_dwt.op(x)), self.scan(x))
        return out


class LocalConv(nn.Module):
    """Local branch: depthwise convolution, norm, ReLU, one scale per channel, norm."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.dwconv3x3 = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.dwconv1x1 = nn.Conv2d(width, width, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = self.bn2(self.dwconv1x1(self.act(self.bn1(self.dwconv3x3(x)))))
        return out

    def folded(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Return both convolutions with their norms folded."""
        return fuse_conv_norm(self.dwconv3x3, self.bn1), fuse_conv_norm(self.dwconv1x1, self.bn2)


class MultiReceptive(nn.Module):
    """Global, local and identity channels side by side, then ReLU and a projection of all."""

    def __init__(self, width: int, stage: int) -> None:
        super().__init__()
        wide = _nearest16(int(_GLOBAL_RATIO[stage] * width))
        near = min(int(_LOCAL_RATIO[stage] * width), width - wide)
        self.widths = [wide, near, width - wide - near]
        self.local_op = LocalConv(near, _KERNEL[stage])
        self.global_op = WaveletScan(wide, _KERNEL[stage])
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        wide, near, passed = x.split(self.widths, 1)
        out: Tensor = self.proj(torch.cat([self.global_op(wide), self.local_op(near), passed], 1))
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form with norms folded and aligned branches."""
        return TwoBranches(self, align)


class TwoBranches(nn.Module):
    """Deploy form of `MultiReceptive`: the identity channels join the local branch.

    There they meet a filter that is one at its centre, a ReLU, harmless since another one is ahead of the projection,
    and a factor of one. The branch reads whole groups of `align` channels up to the last; what it makes of the global
    channels among them meets zero weights in the projection.
    """

    def __init__(self, mixer: MultiReceptive, align: int) -> None:
        super().__init__()
        wide, near, passed = mixer.widths
        width = wide + near + passed
        size = min(-(-(near + passed) // align) * align, width)
        self.spans = ((0, wide), (width - size, width))
        self.global_op = fold(mixer.global_op, align)
        own = tuple(range(size - near - passed, size))
        self.local_op = nn.Sequential(*(_widened(conv, passed, own, size) for conv in mixer.local_op.folded()))
        self.local_op.insert(1, nn.ReLU())
        inputs = Channels((*range(wide), *(wide + place for place in own)), wide + size)
        proj = fold(mixer.proj[1])
        assert isinstance(proj, nn.Conv2d)
        self.proj = nn.Sequential(nn.ReLU(), store(proj, inputs, Channels.joined(width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        wide, near = (x[:, start:stop] for start, stop in self.spans)
        out: Tensor = self.proj(torch.cat([self.global_op(wide), self.local_op(near)], 1))
        return out


def _widened(conv: nn.Conv2d, passed: int, places: tuple[int, ...], width: int) -> nn.Conv2d:
    """Return a depthwise convolution with `passed` more channels, kept as they are, stored at `places` of `width`."""
    assert conv.bias is not None
    keep = nn.init.dirac_(conv.weight.new_empty(passed, *conv.weight.shape[1:]), max(passed, 1))
    more = copy.deepcopy(conv)
    more.weight = nn.Parameter(torch.cat([conv.weight.detach(), keep]))
    more.bias = nn.Parameter(torch.cat([conv.bias.detach(), conv.bias.new_zeros(passed)]))
    stored = Channels(places, width)
    return store(more, stored, stored)


class Mixer(nn.Module):
    """Holds the mixer under the authors' key."""

    def __init__(self, width: int, stage: int) -> None:
        super().__init__()
        self.attn = MultiReceptive(width, stage)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = self.attn(x)
        return out


class Block(nn.Module):
    """Depthwise, feed-forward, mixer, depthwise, feed-forward: each with a skip, and one more over all of them."""

    def __init__(self, width: int, stage: int) -> None:
        super().__init__()
        self.dw0 = depthwise(width)
        self.ffn0 = Residual(FeedForward(width))
        self.mixer = Residual(Mixer(width, stage))
        self.dw1 = depthwise(width)
        self.ffn1 = Residual(FeedForward(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = x + self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))
        return out


def _nearest16(count: int) -> int:
    """Round to the nearest multiple of 16, ties up."""
    return (count + 8) // 16 * 16


class MobileMamba(ThreeStages):
    """The network; its deploy form also keeps the maps of the stem in whole groups of channels."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__(widths, depths, lambda stage, width: Block(width, stage), classes)

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the exact inference form; split channels and those of the stem are padded to multiples of `align`."""
        folded, stem = fold_children(self, align), fold(self.patch_embed)
        assert isinstance(stem, nn.Sequential)
        convs = [layer for layer in stem if isinstance(layer, nn.Conv2d)]
        maps = [Channels.joined(conv.in_channels, align if conv is not convs[0] else 1) for conv in convs]
        maps.append(Channels.joined(convs[-1].out_channels, 1))
        stored = map(store, convs, maps, maps[1:])
        folded.patch_embed = nn.Sequential(*(next(stored) if layer in convs else layer for layer in stem))
        return folded


_B_WIDTHS, _B_DEPTHS = (200, 376, 448), (2, 3, 2)
# name, input size, widths, depths, parameters, MACs, top-1 of the long recipe
_VARIANTS = (
    ("mobilemamba_t2", 192, (144, 272, 368), (1, 2, 2), 8_836_890, 251_717_544, 71.5),
    ("mobilemamba_t4", 192, (176, 368, 448), (1, 2, 2), 14_176_090, 408_698_440, 76.1),
    ("mobilemamba_s6", 224, (192, 384, 448), (1, 2, 2), 15_036_632, 646_707_632, 78.0),
    ("mobilemamba_b1", 256, _B_WIDTHS, _B_DEPTHS, 17_122_849, 1_069_918_208, 79.9),
    ("mobilemamba_b2", 384, _B_WIDTHS, _B_DEPTHS, 17_122_849, 2_404_942_208, 81.6),
    ("mobilemamba_b4", 512, _B_WIDTHS, _B_DEPTHS, 17_122_849, 4_273_975_808, 82.5),
)

for _name, _size, _widths, _depths, _parameters, _macs, _top1 in _VARIANTS:
    register(
        Model(
            name=_name,
            family="mobilemamba",
            build=functools.partial(MobileMamba, _widths, _depths),
            inputs=image(_size),
            parameters=_parameters,
            macs=_macs,
            paper="MobileMamba: Lightweight Multi-Receptive Visual Mamba Network (CVPR 2025)",
            source="lewandofskee/MobileMamba",
            top1=_top1,
            checkpoint=Checkpoint("", ("net_E", "net")),
        )
    )
