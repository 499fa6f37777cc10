"""Parts of DSVT in three dimensions: the point encoder and the backbone of transformer blocks.

Paper: Wang et al., "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023.
Source: github.com/Haiyang-W/DSVT.
Every feature tensor [n, c] and every coords tensor [n, 4], rows (batch, z, y, x), ends with one spare row that stands
for "no voxel". The original computes indices with data-dependent sizes, the deploy form with the fixed ones of
`Capacity`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.kernels import segment_max, segment_mean, set_partition, voxel_pool
from edgeattn.kernels._voxels import partition, pool
from edgeattn.model import Capacity
from edgeattn.models._dsvt_encoder import Block, BlocksOnly, Partition, PositionEmbedding
from edgeattn.models._dsvt_pool import StageReduction
from edgeattn.models._layers import fold_children, norm_affine, set_weights

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """One stage: grid, window and shift per configuration, in cells along x, y, z; `stride` to the next stage."""

    grid: Triple
    windows: tuple[Triple, Triple]
    shifts: tuple[Triple, Triple]
    set_size: int
    blocks: int
    stride: Triple | None = None


def pillar_stages(side: int, window: int, grown: int, set_size: int) -> tuple[Stage, ...]:
    """Return the only stage of a pillar model: four blocks; the second windows are `grown` wide, half a window off."""
    half = window // 2
    windows = ((window, window, 1), (grown, grown, 1))
    return (Stage((side, side, 1), windows, ((0, 0, 0), (half, half, 0)), set_size, blocks=4),)


def voxel_stages(side: int, heights: Sequence[int], window: int, set_size: int) -> tuple[Stage, ...]:
    """Return the stages of a voxel model, one block each: windows span the height, which shrinks to the next one."""
    half = window // 2
    stages = []
    for height, after in zip(heights, [*heights[1:], 0], strict=True):
        windows = ((window, window, height), (2 * window, 2 * window, height))
        stride = (1, 1, height // after) if after else None
        stages.append(Stage((side, side, height), windows, ((0, 0, 0), (half, half, 0)), set_size, 1, stride))
    return tuple(stages)


class PointFeatures(nn.Module):
    """Points with their offsets to the mean of the voxel's points and to the middle of its cell.

    Coordinates reach 75 m and offsets count in millimetres. So the middle comes in two parts, of which the first and
    its difference to a point are exact in float32, and the mean is taken over the offsets.
    """

    def __init__(self, low: Sequence[float], size: Sequence[float]) -> None:
        super().__init__()
        self.size = _coarse_and_rest(size)
        self.first = _coarse_and_rest([start + width / 2 for start, width in zip(low, size, strict=True)])

    def forward(self, points: Tensor, voxel: Tensor, coords: Tensor) -> Tensor:
        """Map points [p, 5], their voxels int [p] (n - 1: none) and coords int [n, 4] to [p, 11]."""
        place, index = points[:, :3], voxel.int()
        cell = coords[:, 1:].flip(1).to(place)
        pairs = zip(self.size, self.first, strict=True)
        parts = [cell * place.new_tensor(size) + place.new_tensor(first) for size, first in pairs]
        coarse, rest = functional.embedding(index, torch.cat(parts, 1)).chunk(2, 1)
        to_middle = place - coarse - rest
        mean = segment_mean.op(to_middle, index, segments=coords.shape[0] - 1)
        return torch.cat([points, to_middle - functional.embedding(index, mean), to_middle], 1)


def _coarse_and_rest(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Split values into multiples of 2^-12, whose products with cell numbers are exact in float32, and what is left."""
    coarse = [round(value * 4096) / 4096 for value in values]
    return coarse, [value - part for value, part in zip(values, coarse, strict=True)]


class PointLayer(nn.Module):
    """Linear layer, norm and ReLU on every point."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [p, inputs] to [p, outputs]."""
        out: Tensor = self.norm(self.linear(x)).relu()
        return out

    def folded(self) -> nn.Linear:
        """Return one linear layer with bias, without the ReLU."""
        scale, shift = norm_affine(self.norm)
        weight = self.linear.weight.detach()
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
        return set_weights(layer, weight.double() * scale.unsqueeze(1), shift)


class PointEncoder(nn.Module):
    """Features of every voxel from its points: two layers, each followed by the maximum over the voxel's points."""

    def __init__(self, low: Sequence[float], size: Sequence[float], width: int, features: int = 5) -> None:
        super().__init__()
        self.augment = PointFeatures(low, size)
        self.pfn_layers = nn.ModuleList([PointLayer(features + 6, width // 2), PointLayer(width, width)])

    def forward(self, points: Tensor, voxel: Tensor, coords: Tensor) -> Tensor:
        """Map points [p, features], their voxels int [p] (n - 1: none) and coords int [n, 4] to [n, width]."""
        segments, index = coords.shape[0] - 1, voxel.int()
        first, second = self.pfn_layers
        x = first(self.augment(points, index, coords))
        top = functional.embedding(index, segment_max.op(x, index, segments=segments))
        out: Tensor = segment_max.op(second(torch.cat([x, top], 1)), index, segments=segments)
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form without norms, with the second layer's share of the voxel maximum computed per voxel."""
        return DeployedPointEncoder(self)


class DeployedPointEncoder(nn.Module):
    """The point encoder for inference; rows without points hold what their bias gives.

    The second layer sees a point's values and the maximum of its voxel. The latter's product is the same for all its
    points, so it is added behind the second maximum, and so are bias and ReLU, which keep the order.
    """

    def __init__(self, original: PointEncoder) -> None:
        super().__init__()
        first, second = original.pfn_layers
        assert isinstance(first, PointLayer)
        assert isinstance(second, PointLayer)
        self.augment = copy.deepcopy(original.augment)
        self.first = first.folded()
        both = second.folded()
        own, shared = both.weight.detach().chunk(2, 1)
        self.point = nn.Linear(own.shape[1], own.shape[0], bias=False, dtype=own.dtype, device=own.device)
        self.voxel = nn.Linear(own.shape[1], own.shape[0], dtype=own.dtype, device=own.device)
        set_weights(self.point, own, both.bias)
        set_weights(self.voxel, shared, both.bias)

    def forward(self, points: Tensor, voxel: Tensor, coords: Tensor) -> Tensor:
        """Map points [p, features], their voxels int32 [p] (n - 1: none) and coords int32 [n, 4] to [n, width]."""
        segments, index = coords.shape[0] - 1, voxel.int()
        x = self.first(self.augment(points, index, coords)).relu()
        top = segment_max.op(x, index, segments=segments)
        out: Tensor = (segment_max.op(self.point(x), index, segments=segments) + self.voxel(top)).relu()
        return out


class InputLayer(nn.Module):
    """Position embeddings by stage, block and layer.

    Published quirk: layer 0 of a block always takes the place in the windows of shift 0 and layer 1 that of shift 1,
    whichever shift the block's sets come from.
    """

    def __init__(self, stages: Sequence[Stage], width: int) -> None:
        super().__init__()
        self.posembed_layers = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(PositionEmbedding(window, width) for window in stage.windows) for _ in range(stage.blocks)
            )
            for stage in stages
        )

    def forward(self, stage: int, block: int, partitions: Sequence[Partition]) -> list[Tensor]:
        """Return the embeddings [n, width] of the two layers of a block."""
        layers = self.posembed_layers[stage][block]  # type: ignore[index]
        return [layer(given.position) for layer, given in zip(layers, partitions, strict=True)]


class Backbone3d(nn.Module):
    """Transformer blocks on sparse voxels, in stages that merge voxels along z.

    Set `capacity` before `deploy`.
    """

    def __init__(self, stages: Sequence[Stage], width: int, heads: int = 8, hidden: int = 0) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.capacity: Capacity | None = None
        self.fixed = False
        self.input_layer = InputLayer(stages, width)
        for number, stage in enumerate(stages):
            blocks = (Block(width, heads, hidden or 2 * width) for _ in range(stage.blocks))
            self.add_module(f"stage_{number}", nn.ModuleList(blocks))
            norms = (nn.LayerNorm(width) for _ in range(stage.blocks))
            self.add_module(f"residual_norm_stage_{number}", nn.ModuleList(norms))
            if stage.stride:
                reduction = StageReduction(width, heads, math.prod(stage.stride))
                self.add_module(f"stage_{number}_reduction", reduction)

    def forward(self, features: Tensor, coords: Tensor, num_voxels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map features [n, c], coords int [n, 4] and num_voxels int32 [1] to those of the last stage, and counts.

        counts is int32 [3 * stages]: the voxels of every stage, then its sets for shift 0 and shift 1 (0 for a shift
        that no block of the stage uses).
        """
        voxels, sets, before = [], [], 0
        for number, stage in enumerate(self.stages):
            partitions = [self._divide(number, shift, coords, num_voxels) for shift in range(2)]
            used = {(before + block) % 2 for block in range(stage.blocks)}
            sets += [given.count if shift in used else given.count * 0 for shift, given in enumerate(partitions)]
            voxels.append(num_voxels)
            features = self._run_blocks(number, before, features, partitions)
            before += stage.blocks
            if stage.stride:
                table, coords, num_voxels = self._merge(number, coords, num_voxels)
                features = self.get_submodule(f"stage_{number}_reduction")(features, table)
        return features, coords, num_voxels, torch.cat([*voxels, *sets]).int()

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the inference form with the sizes of `capacity`, positions tabulated. Raises ValueError without."""
        if self.capacity is None:
            raise ValueError("Backbone3d: set `capacity` before `deploy`")
        folded = fold_children(self, align)
        folded.fixed = True  # type: ignore[assignment]
        return folded

    def blocks_only(self) -> BlocksOnly:
        """Return the blocks alone, with the authors' inputs. Raises ValueError unless there is one stage."""
        if len(self.stages) > 1:
            raise ValueError(f"the blocks of {len(self.stages)} stages are not one graph: merging voxels lies between")
        blocks, norms = (self.get_submodule(name) for name in ("stage_0", "residual_norm_stage_0"))
        assert isinstance(blocks, nn.ModuleList)
        assert isinstance(norms, nn.ModuleList)
        return BlocksOnly(blocks, norms)

    def _run_blocks(self, stage: int, before: int, x: Tensor, partitions: Sequence[Partition]) -> Tensor:
        """Run the blocks of a stage; block number b over all stages uses the sets of shift b % 2."""
        blocks, norms = (self.get_submodule(name) for name in (f"stage_{stage}", f"residual_norm_stage_{stage}"))
        for number in range(self.stages[stage].blocks):
            own = partitions[(before + number) % 2]
            positions = self.input_layer(stage, number, partitions)
            x = norms[number](x + blocks[number](x, positions, own.inds, own.slot))  # type: ignore[index]
        return x

    def _divide(self, number: int, shift: int, coords: Tensor, num_voxels: Tensor) -> Partition:
        """Partition the voxels of stage `number` into sets."""
        stage = self.stages[number]
        grid, window, moved = list(stage.grid), list(stage.windows[shift]), list(stage.shifts[shift])
        if self.fixed and self.capacity is not None:
            size, most = stage.set_size, self.capacity.sets[number][shift]
            return Partition(
                *set_partition.op(
                    coords, num_voxels, grid=grid, window=window, shift=moved, set_size=size, max_sets=most
                )
            )
        inds, slot, position, _ = partition(coords[:-1], grid, window, moved, stage.set_size)
        count = num_voxels.new_tensor([inds.shape[1]])
        if not inds.shape[1]:
            inds = inds.new_zeros(2, 1, stage.set_size)  # no voxel: one set of the spare row
        return Partition(inds.int(), functional.pad(slot, (0, 1)).int(), functional.pad(position, (0, 1)).int(), count)

    def _merge(self, number: int, coords: Tensor, num_voxels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table of merged voxels [m, slots], their coords [m, 4] and their number, behind stage `number`."""
        stage = self.stages[number]
        assert stage.stride is not None
        grid, stride = list(stage.grid), list(stage.stride)
        if self.fixed and self.capacity is not None:
            most, slots = self.capacity.voxels[number + 1], math.prod(stride)
            merged: tuple[Tensor, Tensor, Tensor] = voxel_pool.op(
                coords, num_voxels, grid=grid, stride=stride, max_voxels=most, slots=slots
            )
            return merged
        table, pooled = pool(coords[:-1], grid, stride)
        table = torch.where(table < 0, coords.shape[0] - 1, table)
        table = functional.pad(table, (0, 0, 0, 1), value=coords.shape[0] - 1)
        count = num_voxels.new_tensor([pooled.shape[0]])
        return table.int(), functional.pad(pooled, (0, 0, 0, 1)).int(), count
