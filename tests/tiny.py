"""Small detectors, one per form of the published ones, that export and run in seconds: for the tests of detectors.

A test module says `pytest_plugins = ["tiny"]` to have the fixture.
"""

import pytest

from edgeattn.model import MODELS, Capacity, Model
from edgeattn.models._bev import CenterHead
from edgeattn.models._dsvt_blocks import pillar_stages, voxel_stages
from edgeattn.models._transfusion import TransFusionHead
from edgeattn.models.dsvt import Config, entry

NAME = "dsvt_tiny"
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


def _registered(kind: str):
    model = tiny_model(kind)
    MODELS.names()  # the catalogue is filled on first use
    MODELS.add(model.name, model)
    yield model.name
    del MODELS._items[model.name]


@pytest.fixture(scope="module")
def tiny():
    """Put the pillar detector into the catalogue for one test module, and yield its name."""
    yield from _registered("pillar")


@pytest.fixture(scope="module")
def tiny_voxel():
    """Put the detector with two stages into the catalogue for one test module, and yield its name."""
    yield from _registered("voxel")


@pytest.fixture(scope="module")
def tiny_crowded():
    """Put the detector with the TransFusion head into the catalogue for one test module, and yield its name."""
    yield from _registered("crowded")
