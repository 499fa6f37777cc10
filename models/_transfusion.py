"""TransFusion head of DSVT on nuScenes: proposals from a heat map, one transformer layer on each, candidate boxes.

Papers: Bai et al., "TransFusion: Robust LiDAR-Camera Fusion for 3D Object Detection with Transformers", CVPR 2022; Wang
et al., "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, which lets a proposal see only the cells
around it. Source: github.com/Haiyang-W/DSVT, dense_heads/transfusion_head.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.models._absorbed import absorbed, linear, linear_of, single_token, turned
from edgeattn.models._bev import Maps
from edgeattn.models._layers import fuse_conv_norm
from edgeattn.models._proposals import Positions, Proposals, Shift, TransFusionDecode, neighbours, positions

_TOWER_WIDTH = 64


class HeatConv(nn.Module):
    """3x3 convolution with bias, norm and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, width, h, w] to the same shape."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class PositionEmbedding(nn.Module):
    """Two pointwise layers with a norm and ReLU between them, from (x, y) in cells to a feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(2, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 1)
        )

    def forward(self, position: Tensor) -> Tensor:
        """Map [b, n, 2] to [b, n, width]."""
        feature: Tensor = self.position_embedding_head(position.transpose(1, 2)).transpose(1, 2)
        return feature

    def deploy(self, align: int = 1) -> nn.Module:
        """Return two linear layers for positions [n, 2]."""
        first, norm, act, last = self.position_embedding_head
        assert isinstance(first, nn.Conv1d)
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(last, nn.Conv1d)
        return nn.Sequential(linear_of(first, norm), act, linear_of(last)).eval()


class Decoder(nn.Module):
    """Transformer layer on single proposals: self attention over one token, attention to the cells around, network."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.self_posembed = PositionEmbedding(width)
        self.cross_posembed = PositionEmbedding(width)

    def forward(self, query: Tensor, position: Tensor, keys: Tensor, key_position: Tensor, outside: Tensor) -> Tensor:
        """Map queries [n, 1, c] at [n, 1, 2] to the same shape.

        `keys` [n, k, c] at `key_position` [n, k, 2] are seen except where `outside` [n, k] is true.
        """
        place = self.self_posembed(position)
        own = query + place
        query = self.norm1(query + self.self_attn(own, own, own, need_weights=False)[0])
        keys = keys + self.cross_posembed(key_position)
        seen = self.multihead_attn(query + place, keys, keys, key_padding_mask=outside, need_weights=False)[0]
        return self.feed_forward(self.norm2(query + seen))

    def feed_forward(self, query: Tensor) -> Tensor:
        """Map [..., c] to the same shape: the network, its skip and the last norm."""
        out: Tensor = self.norm3(query + self.linear2(functional.relu(self.linear1(query))))
        return out


class PredictionHead(nn.Module):
    """One tower per quantity: pointwise layer with norm and ReLU, then a pointwise layer to its channels."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        channels = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1, "heatmap": classes}
        for name, count in channels.items():
            tower = nn.Sequential(nn.Conv1d(width, _TOWER_WIDTH, 1), nn.BatchNorm1d(_TOWER_WIDTH), nn.ReLU())
            setattr(self, name, nn.Sequential(tower, nn.Conv1d(_TOWER_WIDTH, count, 1)))

    def forward(self, query: Tensor) -> Maps:
        """Map [b, width, p] to one [b, channels, p] per quantity."""
        return {name: tower(query) for name, tower in self.named_children()}


class TransFusionHead(nn.Module):
    """Proposals from the heat map, refined by attention to the (2 radius + 1)^2 cells around each.

    Flat cells count x-major, cell = ix * size_y + iy, for a grid `size` = (cells along x, along y). Neighbours are
    taken in flat numbers, as in the authors' code: at the ends of a row they wrap into the next one, and only those
    before the first or behind the last cell are masked. `decode` maps the outputs to candidate boxes. The submodules
    `propose`, `positions`, `shift` and `decode` have no parameters and have to stay float32.
    """

    def __init__(
        self,
        inputs: int = 384,
        classes: int = 10,
        *,
        size: tuple[int, int] = (180, 180),
        low: Sequence[float] = (-54.0, -54.0),
        cell: Sequence[float] = (0.6, 0.6),
        width: int = 128,
        heads: int = 8,
        hidden: int = 256,
        proposals: int = 200,
        radius: int = 20,
    ) -> None:
        super().__init__()
        self.size, self.radius = size, radius
        self.shared_conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.heatmap_head = nn.Sequential(HeatConv(width), nn.Conv2d(width, classes, 3, padding=1))
        self.class_encoding = nn.Conv1d(classes, width, 1)
        self.decoder = Decoder(width, heads, hidden)
        self.prediction_head = PredictionHead(width, classes)
        self.propose = Proposals(proposals, classes)
        self.positions, self.shift = Positions(size), Shift()
        self.decode = TransFusionDecode(low=low, cell=cell)

    def forward(self, features: Tensor) -> Maps:
        """Map [b, inputs, size_y, size_x] to raw values [b, channels, proposals] of every proposal.

        center (in cells), height, dim, rot, vel, iou, heatmap, query_score [b, 1, proposals], and query_label of the
        same shape, an integer.
        """
        shared = self.shared_conv(features.transpose(2, 3))
        score, label, cell = self.propose(self.heatmap_head(shared))
        rows = shared.flatten(2).transpose(1, 2)  # [b, cells, c]
        count = self.class_encoding.in_channels
        one_hot = functional.one_hot(label.long(), count).transpose(1, 2).to(rows.dtype)
        query = _rows_at(rows, cell) + self.class_encoding(one_hot).transpose(1, 2)
        around, outside = neighbours(cell, self.size, self.radius)
        keys = _rows_at(rows, around.flatten(1)).reshape(-1, around.shape[2], rows.shape[2])
        position = self.positions(cell, rows)
        key_position = self.positions(around.flatten(0, 1), rows)
        refined = self.decoder(
            query.flatten(0, 1)[:, None], position.flatten(0, 1)[:, None], keys, key_position, outside.flatten(0, 1)
        )
        maps: Maps = self.prediction_head(refined.reshape(query.shape).transpose(1, 2))
        maps["center"] = self.shift(maps["center"], position)
        return {**maps, "query_score": score[:, None], "query_label": label[:, None]}

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form for one cloud; equal in exact arithmetic."""
        return _Deployed(copy.deepcopy(self).eval())


class _Deployed(nn.Module):
    """The head for one cloud, without norms on channels, and with one gather of cells for keys and values.

    For one head of attention the logits are `q . (Wk e + bk)` over cells e: `Wk^T q . e` but for a constant that the
    softmax drops; and the output is `Wv (sum of p e) + bv`. So cells enter unprojected, and only queries are
    projected. Maps stay y-major, as they come; `y_major` translates cells.
    """

    def __init__(self, original: TransFusionHead) -> None:
        super().__init__()
        self.size, self.radius = original.size, original.radius
        self.shared_conv = turned(original.shared_conv)
        first, last = original.heatmap_head
        assert isinstance(first, HeatConv)
        assert isinstance(last, nn.Conv2d)
        heat = fuse_conv_norm(first.conv, first.bn)
        self.heatmap_head = nn.Sequential(turned(heat), nn.ReLU(), turned(last))
        self.propose, self.positions = original.propose, original.positions
        self.shift, self.decode = original.shift, original.decode
        self.decoder = _DeployedDecoder(original.decoder)
        self.prediction_head = _DeployedPredictions(original.prediction_head)
        self._tabulate(original)
        self.eval()

    def _tabulate(self, original: TransFusionHead) -> None:
        """Tabulate what depends on the class or the cell alone."""
        self.classes: Tensor
        self.places: Tensor
        self.y_major: Tensor
        encoding = original.class_encoding
        assert encoding.bias is not None
        weight = encoding.weight.detach()
        self.register_buffer("classes", weight[:, :, 0].T + encoding.bias.detach())
        cell = torch.arange(self.size[0] * self.size[1], dtype=torch.int32)
        self.register_buffer("y_major", (cell % self.size[1] * self.size[0] + cell // self.size[1]).long())
        embed = copy.deepcopy(original.decoder.cross_posembed).double().deploy()
        place = positions(cell.reshape(self.size).T.reshape(1, -1), self.size, torch.float64)
        self.register_buffer("places", embed(place[0]).detach().to(weight))

    def forward(self, features: Tensor) -> Maps:
        """Map [1, inputs, size_y, size_x] to raw values [1, channels, proposals], as the original does.

        Raises ValueError for more than one cloud.
        """
        if features.shape[0] != 1:
            raise ValueError(f"the deploy form takes one cloud, not {features.shape[0]}")
        shared = self.shared_conv(features)
        score, label, cell = self.propose(self.heatmap_head(shared).transpose(2, 3))
        rows = shared[0].flatten(1).T  # [cells, c]
        around, outside = neighbours(cell[0], self.size, self.radius)
        query = rows.index_select(0, self.y_major.index_select(0, cell[0]))
        query = query + self.classes.index_select(0, label[0])
        around = self.y_major.index_select(0, around.flatten())
        keys = (rows + self.places).index_select(0, around).reshape(*outside.shape, -1)
        position = self.positions(cell, rows)
        maps: Maps = self.prediction_head(self.decoder(query, position[0], keys, outside))
        maps["center"] = self.shift(maps["center"], position)
        return {**maps, "query_score": score[:, None], "query_label": label[:, None]}


class _DeployedDecoder(nn.Module):
    """The transformer layer with keys and values unprojected; self attention over one token is a linear layer."""

    def __init__(self, original: Decoder) -> None:
        super().__init__()
        self.heads = original.multihead_attn.num_heads
        self.place = original.self_posembed.deploy()
        self.own = single_token(original.self_attn)
        self.to_keys, self.from_values = absorbed(original.multihead_attn)
        self.norm1, self.norm2, self.norm3 = original.norm1, original.norm2, original.norm3
        self.linear1, self.linear2 = original.linear1, original.linear2

    def forward(self, query: Tensor, position: Tensor, keys: Tensor, outside: Tensor) -> Tensor:
        """Map queries [p, c] at [p, 2] to the same shape; `keys` [p, k, c] have their positions added."""
        place = self.place(position)
        query = self.norm1(query + self.own(query + place))
        asked = self.to_keys(query + place).reshape(query.shape[0], self.heads, -1)
        logits = (asked @ keys.transpose(1, 2)).masked_fill(outside[:, None], float("-inf"))  # [p, heads, k]
        seen = self.from_values((logits.softmax(-1) @ keys).flatten(1))
        query = self.norm2(query + seen)
        out: Tensor = self.norm3(query + self.linear2(functional.relu(self.linear1(query))))
        return out


class _DeployedPredictions(nn.Module):
    """All towers as two linear layers: the first side by side, the second block-diagonal."""

    def __init__(self, original: PredictionHead) -> None:
        super().__init__()
        towers: dict[str, Any] = dict(original.named_children())
        first = [linear_of(tower[0][0], tower[0][1]) for tower in towers.values()]
        last = [linear_of(tower[1]) for tower in towers.values()]
        self.names, self.widths = list(towers), [layer.out_features for layer in last]
        self.first = linear(torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first]))
        blocks = torch.block_diag(*(layer.weight for layer in last))
        self.last = linear(blocks, torch.cat([layer.bias for layer in last]))

    def forward(self, query: Tensor) -> Maps:
        """Map [p, c] to one [1, channels, p] per quantity."""
        values = self.last(functional.relu(self.first(query))).T[None]
        return dict(zip(self.names, values.split(self.widths, 1), strict=True))


def _rows_at(rows: Tensor, cell: Tensor) -> Tensor:
    """Return rows [b, n, c] of `rows` [b, cells, c] at flat cells [b, n]."""
    return rows.gather(1, cell.long()[..., None].expand(-1, -1, rows.shape[2]))
