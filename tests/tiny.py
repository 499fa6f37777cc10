"""Small detectors, one per form of the published ones, that export and run in seconds."""

import numpy as np
import pytest
import torch

from edgeattn.model import MODELS, Capacity, Model
from edgeattn.models._bev import CenterHead
from edgeattn.models._dsvt_blocks import pillar_stages, voxel_stages
from edgeattn.models._transfusion import TransFusionHead
from edgeattn.models.dsvt import Config, entry
from edgeattn.weights import seed_weights

NAME = "dsvt_tiny"
OUTPUTS = ("boxes", "scores", "labels", "counts")
_LOW = (-6.4, -6.4)


def tiny_config(kind: str = "pillar") -> Config:
    """Return a configuration on a grid of 40 x 40: "pillar", "voxel" (two stages) or "crowded" (TransFusion head)."""
    shape = dict(
        name=NAME if kind == "pillar" else f"{NAME}_{kind}",
        low=(*_LOW, -2.0),
        size=(0.32, 0.32, 6.0),
        stages=pillar_stages(40, 12, 24, 36),
        width=32,
        upsample=(1, 2, 4),
        head=lambda: CenterHead(low=_LOW, cell=(0.32, 0.32), top=50),
        nms="center",
        classes=("Vehicle", "Pedestrian", "Cyclist"),
        columns=("intensity", "elongation"),
        capacity=Capacity(2000, (800,), ((96, 80),)),
        parameters=0,
        macs=0,
    )
    if kind == "voxel":
        shape.update(
            size=(0.32, 0.32, 1.5),
            stages=voxel_stages(40, (4, 1), 12, 24),
            capacity=Capacity(2000, (1200, 800), ((96, 96), (80, 80))),
        )
    if kind == "crowded":
        sizes = dict(size=(20, 20), low=_LOW, width=32, heads=4, hidden=48, proposals=30, radius=3)
        shape.update(
            upsample=(0.5, 1, 2),
            head=lambda: TransFusionHead(**sizes),
            nms="crowded",
            classes=tuple(f"class {number}" for number in range(10)),
            columns=("intensity", "time"),
        )
    return Config(**shape)


def tiny_model(kind: str = "pillar") -> Model:
    """Return the catalogue entry of `tiny_config`."""
    return entry(tiny_config(kind))


def tiny_cloud(count: int, seed: int = 0, reach: float = 6.6) -> np.ndarray:
    """Return float32 points [count, 5] spread evenly over the grid, and a little beyond it."""
    drawn = np.random.default_rng(seed).random((count, 5))
    drawn[:, :3] = (2 * drawn[:, :3] - 1) * [reach, reach, 3.0] + [0.0, 0.0, 1.0]
    return drawn.astype(np.float32)


def seeded(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Return the original with seeded weights."""
    module = tiny_model(kind).build().eval()
    seed_weights(module)
    return module.to(dtype)


def run(module, cloud, rows=None, rubbish=2.0) -> dict[str, np.ndarray]:
    """Run one cloud, with rows of rubbish behind it up to `rows`."""
    padded = np.full((rows or len(cloud), 5), rubbish, np.float32)
    padded[: len(cloud)] = cloud
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        found = module(torch.from_numpy(padded).to(dtype), torch.tensor([len(cloud)], dtype=torch.int32))
    return dict(zip(OUTPUTS, (value.numpy() for value in found), strict=True))


def registered(kind: str):
    """Return a fixture that puts a detector into the catalogue for one test module, and yields its name.

    Say `tiny = registered("pillar")` at the top of the module.
    """

    @pytest.fixture(scope="module")
    def name():
        model = tiny_model(kind)
        MODELS.names()  # the catalogue is filled on first use
        MODELS.add(model.name, model)
        yield model.name
        del MODELS._items[model.name]

    return name


tiny = registered("pillar")
