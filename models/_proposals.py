"""Proposals of the TransFusion head: chosen from the heat map, the cells around them, and their decoding to boxes.

Paper: Bai et al., "TransFusion: Robust LiDAR-Camera Fusion for 3D Object Detection with Transformers", CVPR 2022.
Source: github.com/Haiyang-W/DSVT, dense_heads/transfusion_head.py. Nothing here has parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.models._bev import Boxes, Maps, Placement, corners_of, corrected_score, kept_boxes, largest, row_of

# Pedestrians and traffic cones stand close together: every cell of theirs may be a proposal.
_CROWDED = (8, 9)


class Proposals(nn.Module):
    """The `count` best local maxima of the heat map over all classes; no parameters, so that it can stay float32.

    A cell is one if nothing in its 3x3 neighbourhood exceeds it; the outermost ring never is. For the classes in
    `crowded` every cell is.
    """

    def __init__(self, count: int, classes: int, crowded: Sequence[int] = _CROWDED) -> None:
        super().__init__()
        self.count = count
        self.every: Tensor
        every = torch.tensor([index in crowded for index in range(classes)])
        self.register_buffer("every", every.reshape(1, -1, 1, 1), persistent=False)

    def forward(self, heat: Tensor) -> Boxes:
        """Map logits [b, classes, x, y] to score, int32 class and flat cell of the proposals [b, count], falling."""
        heat = heat.sigmoid()
        peak = functional.pad(functional.max_pool2d(heat, 3, 1), (1, 1, 1, 1))
        surviving = torch.where((heat == peak) | self.every, heat, torch.zeros_like(heat))
        cells = heat.shape[2] * heat.shape[3]
        score, chosen = largest(surviving.flatten(1), self.count)
        return score, row_of(chosen.int(), cells, heat.shape[1]), chosen.int() % cells


class TransFusionDecode(nn.Module):
    """Raw values of the proposals as boxes, with scores corrected by the predicted IoU; no parameters.

    A box counts when its score is positive and its centre lies within `limits` (low x, y, z, high x, y, z). The score
    becomes score^(1 - r) * clamp((iou + 1) / 2, 0, 1)^r, r = `rectifier`.
    """

    def __init__(
        self,
        *,
        low: Sequence[float] = (-54.0, -54.0),
        cell: Sequence[float] = (0.6, 0.6),
        limits: Sequence[float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
        rectifier: float = 0.5,
    ) -> None:
        super().__init__()
        self.rectifier = rectifier
        self.place = Placement(low, cell, limits)

    def forward(self, maps: Maps) -> Boxes:
        """Map raw values to boxes [b, p, 9] (x, y, z, dx, dy, dz, heading, vx, vy), scores and int32 labels [b, p].

        Boxes stand in the order of the proposals; labels start at 1. A dropped box is all zero: label 0. The class
        is that of the proposal: the authors multiply the scores of all others by zero.
        """
        label = maps["query_label"]
        score = (maps["heatmap"].gather(1, label.long()).sigmoid() * maps["query_score"])[:, 0]
        size = maps["dim"].exp()
        position, inside = self.place(maps["center"], maps["height"] - size[:, 2:] / 2)
        heading = torch.atan2(maps["rot"][:, :1], maps["rot"][:, 1:])
        box = torch.cat([position, size, heading, maps["vel"]], 1)
        return kept_boxes(
            inside & (score > 0), box, corrected_score(score, maps["iou"][:, 0], self.rectifier), label[:, 0]
        )


def neighbours(cell: Tensor, size: tuple[int, int], radius: int) -> tuple[Tensor, Tensor]:
    """Return the flat cells around `cell` [...] and whether they lie off the map, each [..., (2 radius + 1)^2].

    Flat numbers are what counts, so neighbours beyond the ends of a row wrap into the next one. Those off the map stand
    for `cell` itself: they are read, and then masked.
    """
    reach = torch.arange(-radius, radius + 1, dtype=cell.dtype, device=cell.device)
    around = cell[..., None] + (reach[:, None] * size[1] + reach).flatten()
    outside = (around < 0) | (around >= size[0] * size[1])
    return torch.where(outside, cell[..., None], around), outside


class Positions(nn.Module):
    """Cells to positions; a module of its own because flat cells are beyond float16."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, cell: Tensor, like: Tensor) -> Tensor:
        """Return the centres (x, y) [b, n, 2] of flat cells [b, n], in cells, in the dtype of `like`."""
        return positions(cell, self.size, like.dtype)


class Shift(nn.Module):
    """Offsets to centres; a module of its own because float16 knows an eighth of a cell at the far end."""

    def forward(self, offset: Tensor, position: Tensor) -> Tensor:
        """Return offsets [b, 2, n] added to positions [b, n, 2], as [b, 2, n]."""
        return offset + position.transpose(1, 2)


def positions(cell: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the centres (x, y) [b, n, 2] of flat cells [b, n], in cells."""
    return corners_of(cell, size[1], dtype).transpose(1, 2) + 0.5
