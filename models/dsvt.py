"""DSVT (Wang et al., CVPR 2023, arXiv 2301.06051): a point cloud to boxes, as one model.

Points become pillars or voxels, the voxels of a window are split into sets of equal size in two orders, and attention
runs inside each set; the features make a bird's-eye map for a convolutional backbone and a detection head. The original
numbers voxels and sets dynamically; the deploy form has fixed capacities and reports how much it would have needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn import clouds
from edgeattn.detection import Detector
from edgeattn.errors import UsageError
from edgeattn.kernels import bev_scatter, voxelize
from edgeattn.kernels._voxels import voxels_of
from edgeattn.model import Capacity, Checkpoint, Cloud, InputSpec, Model, register
from edgeattn.models._bev import Backbone2d, CenterHead
from edgeattn.models._dsvt_blocks import Backbone3d, PointEncoder, Stage, pillar_stages, voxel_stages
from edgeattn.models._layers import fold
from edgeattn.models._transfusion import TransFusionHead
from edgeattn.tensors import Dim, TensorSpec

Triple = tuple[float, float, float]
_FEWEST = 3  # of what has a range: the exporter wants two sizes
_WAYMO = ("Vehicle", "Pedestrian", "Cyclist")
_NUSCENES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip


# Half precision rounds coordinates by centimetres: they, and the layer that reads them (its name in both forms), stay
# float32, and so does what picks and decodes boxes.
_EXACT = (
    "voxels*", "vfe.augment*", "vfe.pfn_layers.0*", "vfe.first*", "dense_head.decode*", "dense_head.propose*",
    "dense_head.positions*", "dense_head.shift*",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A published configuration: range and cell in metres, stages, widths, head, and the sizes of its deploy form.

    `columns` are the features of a point behind x, y and z; Waymo's have passed through tanh. `macs` counts what does
    not depend on the cloud: the bird's-eye backbone and the head.
    """

    name: str
    low: Triple
    size: Triple
    stages: tuple[Stage, ...]
    width: int
    upsample: tuple[float, ...]
    head: Callable[[], CenterHead | TransFusionHead]
    nms: str
    classes: tuple[str, ...]
    columns: tuple[str, str]
    capacity: Capacity
    parameters: int
    macs: int
    ground: float = 0.0

    @property
    def space(self) -> clouds.VoxelSpec:
        """Return how clouds are cut into voxels and sets, for the host."""
        strides = [(1, 1, 1), *(stage.stride for stage in self.stages)]
        stages = [
            clouds.Stage(stage.windows, stage.shifts, stride or (1, 1, 1))
            for stage, stride in zip(self.stages, strides, strict=False)
        ]
        first = self.stages[0]
        return clouds.VoxelSpec(self.low, self.size, first.grid, first.set_size, tuple(stages), ground=self.ground)


class Voxels(nn.Module):
    """The cells that hold points; a module of its own because coordinates may not be rounded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.low, self.size, self.grid = config.low, config.size, config.stages[0].grid

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map points [b, p, 5] and num_points int32 [b] to what lies in the range.

        Returns its points [q, 5], their voxels int32 [q], and coords int32 [v + 1, 4].
        """
        given = torch.arange(points.shape[1], device=points.device) < num_points.reshape(-1, 1)
        flat = points[given]
        voxel, coords = voxels_of(flat, self.low, self.size, self.grid, batch_index=given.nonzero()[:, 0])
        inside = voxel >= 0
        return flat[inside], voxel[inside].int(), nn.functional.pad(coords, (0, 0, 0, 1)).int()


class DSVT(nn.Module):
    """The detector. Sparse tensors carry one row more than there are voxels, for what belongs to none."""

    global_step: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.capacity = config.capacity
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        self.voxels = Voxels(config)
        self.vfe = PointEncoder(config.low, config.size, config.width)
        self.backbone_3d = Backbone3d(config.stages, config.width)
        self.backbone_2d = Backbone2d(config.width, config.upsample)
        self.dense_head = config.head()

    def limit(self, points: int | None = None, voxels: Sequence[int] = (), sets: Sequence[int] = ()) -> None:
        """Set the capacities of the deploy form; what is not given stays.

        `voxels` is one number per stage or one for the first, `sets` one for both shifts or one each. Raises EA0115.
        """
        self.capacity = _limited(self.capacity, points, voxels, sets)

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map points [p, 5] with num_points int32 [1], or [b, p, 5] with [b], to candidate boxes.

        Returns boxes [k, 7 or 9] (x, y, z, dx, dy, dz, heading, and vx, vy on nuScenes), scores [k] and int32 labels
        [k] (from 1; 0 where there is no box), all with the batch ahead if there is one, and int32 counts: voxels per
        stage, then sets per stage and shift. Suppression follows on the host.
        """
        batch = points if points.dim() == 3 else points.unsqueeze(0)
        flat, voxel, coords = self.voxels(batch, num_points)
        features = self.vfe(flat, voxel, coords)
        count = num_points.new_full((1,), coords.shape[0] - 1)
        features, coords, _, counts = self.backbone_3d(features, coords, count)
        maps = self.dense_head(self.backbone_2d(self._bev(features, coords, batch.shape[0])))
        boxes, scores, labels = self.dense_head.decode(maps)
        if points.dim() == 2:
            boxes, scores, labels = boxes[0], scores[0], labels[0]
        return boxes, scores, labels, counts

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form with fixed capacities, for one cloud: norms folded and positions tabulated."""
        return FixedDSVT(self, align)

    def blocks(self) -> nn.Module:
        """Return the transformer blocks alone, under the authors' interface. Raises EA0115 for several stages."""
        if len(self.config.stages) > 1:
            raise UsageError("EA0115", "--split blocks: this model merges voxels between its blocks")
        return self.backbone_3d.blocks_only()

    def block_inputs(self) -> tuple[TensorSpec, ...]:
        """Return the inputs of `blocks`: voxel and set counts are dynamic, up to the capacity."""
        stage, fixed = self.config.stages[0], Dim.fixed
        voxels = _up_to("voxels", self.capacity.voxels[0])
        sets = [(fixed(2), _up_to(f"sets_{shift}", most), fixed(stage.set_size))
                for shift, most in enumerate(self.capacity.sets[0])]  # fmt: skip
        positions = (fixed(stage.blocks), fixed(2), voxels, fixed(self.config.width))
        return (
            TensorSpec("src", "float32", (voxels, fixed(self.config.width))),
            *(TensorSpec(f"set_voxel_inds_tensor_shift_{shift}", "int32", dims) for shift, dims in enumerate(sets)),
            *(TensorSpec(f"set_voxel_masks_tensor_shift_{shift}", "bool", dims) for shift, dims in enumerate(sets)),
            TensorSpec("pos_embed_tensor", "float32", positions),
        )

    def _bev(self, features: Tensor, coords: Tensor, batch: int) -> Tensor:
        """Lay the rows of the voxels out as maps [b, c, ny, nx]."""
        nx, ny, _ = self.config.stages[0].grid
        where = coords[:-1].long()
        maps = features.new_zeros(batch, ny, nx, features.shape[1])
        maps[where[:, 0], where[:, 2], where[:, 3]] = features[:-1]
        return maps.permute(0, 3, 1, 2).contiguous()


class FixedDSVT(nn.Module):
    """Deploy form of `DSVT`: points [capacity, 5] and their number to candidates; no shape depends on the data."""

    def __init__(self, detector: DSVT, align: int) -> None:
        super().__init__()
        self.config = detector.config
        self.voxels = detector.capacity.voxels[0]
        detector.backbone_3d.capacity = detector.capacity
        self.vfe, self.backbone_3d, self.backbone_2d, self.dense_head = (
            fold(part, align)
            for part in (detector.vfe, detector.backbone_3d, detector.backbone_2d, detector.dense_head)
        )

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map points [p, 5] and num_points int32 [1] to boxes, scores, labels and counts, as `DSVT` does."""
        corner = dict(zip(("low_x", "low_y", "low_z"), self.config.low, strict=True))
        cell = dict(zip(("size_x", "size_y", "size_z"), self.config.size, strict=True))
        grid = list(self.config.stages[0].grid)
        cut: dict[str, Any] = {**corner, **cell, "grid": grid, "axes": 3, "max_voxels": self.voxels}
        voxel, coords, count = voxelize.op(points, num_points, **cut)
        features = self.vfe(points, voxel, coords)
        features, coords, count, counts = self.backbone_3d(features, coords, count)
        bev = bev_scatter.op(features, coords, count, height=grid[1], width=grid[0])
        decode: Any = self.dense_head.decode
        boxes, scores, labels = decode(self.dense_head(self.backbone_2d(bev)))
        return boxes[0], scores[0], labels[0], counts


def _up_to(name: str, most: int) -> Dim:
    """Return the dimension of a count from 2 (the exporter would take 1 for a constant). Raises EA0115."""
    if most < _FEWEST:
        raise UsageError("EA0115", f"--split blocks: room for {most} {name}, at least {_FEWEST} wanted")
    return Dim(name, 2, max(2, most // 2), most)


def _limited(capacity: Capacity, points: int | None, voxels: Sequence[int], sets: Sequence[int]) -> Capacity:
    """Return `capacity` with what was given. Raises EA0115 for numbers that do not fit the model."""
    stages = len(capacity.voxels)
    if len(voxels) not in (0, 1, stages):
        raise UsageError("EA0115", f"--max-voxels: once, or once for each of {stages} stages; got {len(voxels)}")
    if len(sets) not in (0, 1, 2):
        raise UsageError("EA0115", f"--max-sets: once, or once for each of 2 shifts; got {len(sets)}")
    if any(number < 1 for number in (*voxels, *sets, 1 if points is None else points)):
        raise UsageError("EA0115", "capacities are 1 or more")
    found = replace(capacity, points=capacity.points if points is None else points)
    if voxels:
        # Merging makes no voxels: later stages need no more than the first.
        later = voxels[1:] or [min(voxels[0], number) for number in capacity.voxels[1:]]
        found = replace(found, voxels=(voxels[0], *later))
    return replace(found, sets=((sets[0], sets[-1]),) * stages) if sets else found


def entry(config: Config) -> Model:
    """Return the catalogue entry of a configuration."""
    cloud = Cloud(("x", "y", "z", *config.columns), config.space)
    return Model(
        config.name,
        "dsvt",
        lambda: DSVT(config),
        (InputSpec("points", (config.capacity.points, 5), cloud=cloud), InputSpec("num_points", (1,), "int32")),
        config.parameters,
        config.macs,
        "https://arxiv.org/abs/2301.06051",
        "https://github.com/Haiyang-W/DSVT",
        outputs=("boxes", "scores", "labels", "counts"),
        checkpoint=Checkpoint(wrappers=("model_state",)),
        detector=Detector(config.classes, config.nms, ("vfe", "backbone_3d", "backbone_2d", "dense_head")),
        keep_fp32=_EXACT,
    )


# Room for a full sweep: the authors' engines go up to 35,000 pillars and 1,500 sets.
CONFIGS = (
    Config(
        "dsvt_waymo_pillar",
        low=(-74.88, -74.88, -2.0),
        size=(0.32, 0.32, 6.0),
        stages=pillar_stages(468, 12, 24, 36),
        width=192,
        upsample=(1, 2, 4),
        head=CenterHead,
        nms="center",
        classes=_WAYMO,
        columns=("intensity", "elongation"),
        capacity=Capacity(200_000, (40_000,), ((2_048, 1_536),)),
        parameters=8_653_292,
        macs=357_671_448_576,
    ),
    Config(
        "dsvt_waymo_voxel",
        low=(-74.88, -74.88, -2.0),
        size=(0.32, 0.32, 0.1875),
        stages=voxel_stages(468, (32, 8, 2, 1), 12, 48),
        width=192,
        upsample=(1, 2, 4),
        head=CenterHead,
        nms="center",
        classes=_WAYMO,
        columns=("intensity", "elongation"),
        capacity=Capacity(200_000, (64_000, 56_000, 48_000, 40_000), ((2_560, 1_792),) * 4),
        parameters=9_102_188,
        macs=357_671_448_576,
    ),
    Config(
        "dsvt_nuscenes_pillar",
        low=(-54.0, -54.0, -5.0),
        size=(0.3, 0.3, 8.0),
        stages=pillar_stages(360, 30, 30, 90),
        width=128,
        upsample=(0.5, 1, 2),
        head=TransFusionHead,
        nms="crowded",
        classes=_NUSCENES,
        columns=("intensity", "time"),
        capacity=Capacity(300_000, (40_000,), ((768, 768),)),
        parameters=7_118_559,
        macs=174_247_539_200,
        ground=-1.8,
    ),
)
for _config in CONFIGS:
    register(entry(_config))
