"""Bird's-eye part of DSVT: the residual 2-D backbone and the centre head, from a map of pillars to candidate boxes.

Paper: Wang et al., "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023; the head is that of Yin et
al., "Center-based 3D Object Detection and Tracking", CVPR 2021. Source: github.com/Haiyang-W/DSVT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeattn.models._layers import fold_children, fuse_conv_norm, norm_affine, set_weights

_EPS = 1e-3
# Channels of the three levels, and their basic blocks after the first one.
_LEVELS = ((128, 1), (128, 2), (256, 2))
_UP_WIDTH = 128

Maps = dict[str, Tensor]
Boxes = tuple[Tensor, Tensor, Tensor]


class ConvNormAct(nn.Sequential):
    """Convolution (or transposed convolution), batch norm and perhaps ReLU, under the keys 0 and 1."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, *, act: bool = True) -> None:
        norm = nn.BatchNorm2d(conv.out_channels, eps=_EPS)
        super().__init__(conv, norm, *([nn.ReLU()] if act else []))

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the same without the norm; a transposed convolution of one cell becomes an ordinary one."""
        conv, norm = self[0], self[1]
        assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
        assert isinstance(norm, nn.BatchNorm2d)
        fused = fuse_conv_norm(conv, norm) if isinstance(conv, nn.Conv2d) else _fuse_transposed(conv, norm)
        return nn.Sequential(fused, *list(self)[2:]).eval()


def _fuse_transposed(conv: nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> nn.Module:
    """Return `norm(conv(x))` as one layer with bias, for a transposed convolution without overlaps and bias."""
    scale, shift = norm_affine(norm)
    weight = conv.weight.detach().double() * scale.reshape(1, -1, 1, 1)  # [in, out, k, k]
    if conv.kernel_size == (1, 1):
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1).to(conv.weight)
        return set_weights(plain, weight.transpose(0, 1), shift)
    fused = copy.deepcopy(conv).eval()
    fused.bias = nn.Parameter(shift.to(conv.weight))
    with torch.no_grad():
        fused.weight.copy_(weight)
    return fused


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms and a skip; the first block of a level projects the skip."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_EPS)
        if project:
            self.downsample_layer = ConvNormAct(nn.Conv2d(inputs, outputs, 1, stride, bias=False), act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, outputs, ceil(h / stride), ceil(w / stride)]."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        skip = self.downsample_layer(x) if hasattr(self, "downsample_layer") else x
        out: Tensor = self.act(y + skip)
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the same without norms."""
        folded = fold_children(self, align)
        folded.conv1, folded.bn1 = fuse_conv_norm(self.conv1, self.bn1), nn.Identity()
        folded.conv2, folded.bn2 = fuse_conv_norm(self.conv2, self.bn2), nn.Identity()
        return folded


class Backbone2d(nn.Module):
    """Three levels of basic blocks at strides 1, 2 and 4, each brought to one size and concatenated.

    `upsample` holds the factor of each level: (1, 2, 4) on Waymo, (0.5, 1, 2) on nuScenes, where a factor below one is
    a strided convolution. Source: base_bev_res_backbone.py.
    """

    def __init__(self, inputs: int, upsample: Sequence[float] = (1, 2, 4)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.deblocks = nn.ModuleList()
        for level, ((width, more), factor) in enumerate(zip(_LEVELS, upsample, strict=True)):
            first = BasicBlock(inputs, width, 1 if level == 0 else 2, project=True)
            self.blocks.append(nn.Sequential(first, *(BasicBlock(width, width) for _ in range(more))))
            self.deblocks.append(ConvNormAct(_resize(width, factor)))
            inputs = width

    def forward(self, bev: Tensor) -> Tensor:
        """Map [b, inputs, h, w] to [b, 384, h * f, w * f], f the factor of the first level; h and w divide by 4."""
        levels = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            levels.append(deblock(bev))
        return torch.cat(levels, 1)


def _resize(width: int, factor: float) -> nn.Conv2d | nn.ConvTranspose2d:
    if factor < 1:
        stride = round(1 / factor)
        return nn.Conv2d(width, _UP_WIDTH, stride, stride, bias=False)
    return nn.ConvTranspose2d(width, _UP_WIDTH, int(factor), int(factor), bias=False)


class SeparateHead(nn.Module):
    """One tower per quantity: 3x3 convolution with norm and ReLU, then a 3x3 convolution to its channels."""

    def __init__(self, width: int, channels: dict[str, int]) -> None:
        super().__init__()
        for name, count in channels.items():
            tower = ConvNormAct(nn.Conv2d(width, width, 3, 1, 1, bias=False))
            setattr(self, name, nn.Sequential(tower, nn.Conv2d(width, count, 3, 1, 1)))

    def forward(self, x: Tensor) -> Maps:
        """Map [b, width, h, w] to one map [b, channels, h, w] per quantity."""
        return {name: tower(x) for name, tower in self.named_children()}


class CenterHead(nn.Module):
    """Centre head: raw maps of centre, height, size, heading, IoU and class heat, and their decoding.

    `decode` maps these maps to candidate boxes; it is a submodule without parameters, so that it can stay float32.
    Source: dense_heads/center_head.py.
    """

    def __init__(
        self,
        inputs: int = 384,
        classes: int = 3,
        *,
        width: int = 64,
        low: Sequence[float] = (-74.88, -74.88),
        cell: Sequence[float] = (0.32, 0.32),
        top: int = 500,
    ) -> None:
        super().__init__()
        channels = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1, "hm": classes}
        self.shared_conv = ConvNormAct(nn.Conv2d(inputs, width, 3, 1, 1, bias=False))
        self.heads_list = nn.ModuleList([SeparateHead(width, channels)])
        self.decode = CenterDecode(low=low, cell=cell, top=top)

    def forward(self, features: Tensor) -> Maps:
        """Map [b, inputs, h, w] to raw maps [b, channels, h, w]: center, center_z, dim, rot, iou, hm."""
        maps: Maps = self.heads_list[0](self.shared_conv(features))
        return maps


class CenterDecode(nn.Module):
    """The `top` best cells of all classes as boxes, with scores corrected by the predicted IoU.

    A box counts when its class score exceeds `threshold` and its centre lies within `limits` (low x, y, z, high x, y,
    z); the score becomes score^(1 - r) * clamp((iou + 1) / 2, 0, 1)^r with r of its class in `rectifier`. Suppression
    follows on the host (`edgeattn.boxes`). Source: model_utils/centernet_utils.py.
    """

    def __init__(
        self,
        *,
        low: Sequence[float] = (-74.88, -74.88),
        cell: Sequence[float] = (0.32, 0.32),
        top: int = 500,
        threshold: float = 0.1,
        limits: Sequence[float] = (-80, -80, -10, 80, 80, 10),
        rectifier: Sequence[float] = (0.68, 0.71, 0.65),
    ) -> None:
        super().__init__()
        self.top, self.threshold, self.rectifier = top, threshold, list(rectifier)
        self.place = Placement(low, cell, limits)

    def forward(self, maps: Maps) -> Boxes:
        """Map raw maps to boxes [b, top, 7] (x, y, z, dx, dy, dz, heading), scores and int32 labels [b, top].

        Boxes stand in falling order of the uncorrected score; labels start at 1. A dropped box is all zero: label 0.
        At most h * w boxes come out of a map with fewer cells than `top`.
        """
        height, width = maps["hm"].shape[2:]
        logit, label, cell = best_cells(maps["hm"], min(self.top, height * width))
        center, center_z, dim, rot, iou = (
            at_cells(maps[name], cell) for name in ("center", "center_z", "dim", "rot", "iou")
        )
        position, inside = self.place(center + corners_of(cell, width, center.dtype).flip(1), center_z)
        box = torch.cat([position, dim.exp(), torch.atan2(rot[:, 1:], rot[:, :1])], 1)
        score = logit.sigmoid()
        share = score.new_tensor(self.rectifier).index_select(0, label.flatten()).reshape(label.shape)
        corrected = corrected_score(score, iou[:, 0], share)
        return kept_boxes(inside & (score > self.threshold), box, corrected, label)


class Placement(nn.Module):
    """Cells to metres, and whether a centre lies within `limits` (low x, y, z, high x, y, z); no parameters."""

    def __init__(self, low: Sequence[float], cell: Sequence[float], limits: Sequence[float]) -> None:
        super().__init__()
        self.low, self.cell = _column(low), _column(cell)
        self.lowest, self.highest = _column(limits[:3]), _column(limits[3:])

    def forward(self, center: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map centres [b, 2, k] in cells and heights [b, 1, k] to positions [b, 3, k] in metres and a mask [b, k]."""
        metres = center * center.new_tensor(self.cell) + center.new_tensor(self.low)
        position = torch.cat([metres, z], 1)
        inside = (position >= z.new_tensor(self.lowest)) & (position <= z.new_tensor(self.highest))
        return position, inside.all(1)


def _column(values: Sequence[float]) -> list[list[float]]:
    return [[float(value)] for value in values]


def best_cells(heat: Tensor, top: int) -> Boxes:
    """Return logit, class and flat cell, each [b, top], of the best cells of `heat` [b, classes, h, w], falling.

    The best of each class are taken first, then the best of these. Class and cell are int32, as all index arithmetic.
    """
    best, cell = largest(heat.flatten(2), top)  # [b, classes, top]
    logit, chosen = largest(best.flatten(1), top)
    return logit, row_of(chosen.int(), top, heat.shape[1]), cell.flatten(1).gather(1, chosen).int()


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values along the last axis, falling, and their places; of equal ones the first.

    The heat of empty regions is one value, thousands of times, and torch takes any of it. ONNX Runtime takes the first
    places, so the original does too; an exported graph has a plain TopK.
    """
    top, place = values.topk(count)
    if torch.compiler.is_exporting() or bool(top.isnan().any()):
        return top, place
    above, equal = values > top[..., -1:], values == top[..., -1:]
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    place = chosen.nonzero()[:, -1].reshape(top.shape)
    top, order = values.gather(-1, place).sort(dim=-1, descending=True, stable=True)
    return top, place.gather(-1, order)


def row_of(index: Tensor, width: int, rows: int) -> Tensor:
    """Return index // width for indices below rows * width.

    Counted, because an integer division leaves the exporter as eight nodes, or as a division of floats that an engine
    may round.
    """
    starts = torch.arange(width, rows * width, width, dtype=index.dtype, device=index.device)
    return (index[..., None] >= starts).sum(-1, dtype=index.dtype)


def corners_of(cell: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return row and column [b, 2, n] of flat cells [b, n] in rows of `width`, as floats."""
    column = cell % width
    return torch.stack([(cell - column).to(dtype) / width, column.to(dtype)], 1)


def corrected_score(score: Tensor, iou: Tensor, share: Tensor | float) -> Tensor:
    """Return the score moved by `share` towards the predicted IoU, given in [-1, 1]."""
    return score ** (1 - share) * ((iou + 1) / 2).clamp(0, 1) ** share


def at_cells(maps: Tensor, cell: Tensor) -> Tensor:
    """Return the columns [b, channels, k] of `maps` [b, channels, h, w] at flat cells [b, k]."""
    return maps.flatten(2).gather(2, cell.long()[:, None].expand(-1, maps.shape[1], -1))


def kept_boxes(kept: Tensor, box: Tensor, score: Tensor, label: Tensor) -> Boxes:
    """Return boxes [b, k, c] of `box` [b, c, k], scores and int32 labels from 1, all zero where `kept` is false."""
    labels = torch.where(kept, label.int() + 1, 0)
    return torch.where(kept[:, None], box, 0.0).transpose(1, 2), torch.where(kept, score, 0.0), labels
