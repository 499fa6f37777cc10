"""Model: one published variant of a PyTorch original, with its inputs, checkpoint layout and published figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeattn.clouds import VoxelSpec
from edgeattn.detection import Detector
from edgeattn.registry import Registry

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input: resize the shorter side, crop the centre, scale to [0, 1], normalise."""

    resize: int
    crop: int
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Cloud:
    """How a point cloud becomes the inputs: the columns of a point, and how `space` is cut into voxels and sets.

    The graph takes as many rows as its capacity, zeros behind the points, and their number as the input `count`.
    """

    columns: tuple[str, ...]
    space: VoxelSpec
    count: str = "num_points"


@dataclass(frozen=True)
class InputSpec:
    """A network input: name, dims at batch 1 and dtype; `preprocess` for images, `cloud` for point clouds."""

    name: str
    dims: tuple[int, ...]
    dtype: str = "float32"
    preprocess: Preprocess | None = None
    cloud: Cloud | None = None


@dataclass(frozen=True)
class Capacity:
    """Sizes of a detector's deploy form: points, voxels per stage, sets per stage as (shift 0, shift 1)."""

    points: int
    voxels: tuple[int, ...]
    sets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Checkpoint:
    """The authors' file: its address, the keys that may wrap the state dict (best first) and the entries to ignore."""

    url: str = ""
    wrappers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A catalogue entry. `build()` returns the PyTorch original, whose state dict has exactly the authors' keys.

    The module may have `deploy(align: int = 1) -> nn.Module`: an exact inference form (norms, scales and branches
    folded), with split channels padded to a multiple of `align`. `parameters` and `macs` are measured, `top1` (percent,
    ImageNet-1k) is the published figure; `tolerance` is the float32 error allowed, relative to the largest output;
    `keep_fp32` are module patterns that stay float32 at every precision.

    The module of a detector has `capacity`, and `limit(points=, voxels=, sets=)` to change it before `deploy`.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]
    parameters: int
    macs: int
    paper: str
    source: str
    outputs: tuple[str, ...] = ("logits",)
    top1: float | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tolerance: float = 1e-5
    detector: Detector | None = None
    keep_fp32: tuple[str, ...] = ()


MODELS: Registry[Model] = Registry("model", "edgeattn.models")


def register(model: Model) -> Model:
    """Add `model` to the catalogue and return it."""
    MODELS.add(model.name, model)
    return model


def image(size: int, *, resize: int | None = None) -> tuple[InputSpec, ...]:
    """Return the input of an ImageNet classifier; the shorter side is resized to floor(size / 0.875) by default."""
    preprocess = Preprocess(resize or int(size / 0.875), size)
    return (InputSpec("image", (1, 3, size, size), preprocess=preprocess),)
