"""Inputs to validate with, one sample at a time: seeded ones, images, point clouds, or the arrays of an .npz file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import detection
from edgeattn.clouds import list_clouds, load_cloud
from edgeattn.detection import cloud_input
from edgeattn.errors import UsageError
from edgeattn.image import SUFFIXES, load_image
from edgeattn.listing import list_files
from edgeattn.npz import Sample, open_npz
from edgeattn.seeding import noise
from edgeattn.tensors import Dim, TensorSpec

_SEEDED_SAMPLES = 8
# Cells of the noise grids, in pixels, and their amplitudes: about equal power per octave, as in photographs.
_SCALES = ((128, 0.7), (64, 0.6), (32, 0.5), (16, 0.4), (8, 0.3), (4, 0.22), (2, 0.15), (1, 0.1))
# The values that a normalised image can take under the ImageNet mean and deviation.
_DARKEST, _BRIGHTEST = -2.1, 2.6


@dataclass(frozen=True)
class Data:
    """Samples of (id, {input name: array}), made anew by every iteration and one at a time.

    `lost` says, by id, what of the samples read so far did not fit.
    """

    description: str
    count: int
    samples: Callable[[], Iterator[Sample]]
    seeded: bool = False
    lost: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()


def open_data(
    spec: str | Path | None, inputs: Sequence[TensorSpec], *, samples: int | None = None, seed: int = 0
) -> Data:
    """Return the samples that `spec` names, in fixed order: an image, an image folder, an .npz file, "seed:N" or None.

    Dynamic sizes take their best value. At most `samples` samples are used: evenly spread over a folder, the first
    ones of an .npz file, 8 of seeded data by default. Raises EA0140 for a `spec` that cannot be used, EA0142 for an
    .npz file that does not fit, EA0143 where the model takes no image; a bad image raises EA0141 when its turn comes.
    """
    if samples is not None and samples < 1:
        raise UsageError("EA0140", f"--samples {samples}: at least 1 is needed")
    if spec is None or str(spec).startswith("seed:"):
        return _seeded(seed if spec is None else _seed(str(spec)), inputs, samples or _SEEDED_SAMPLES)
    path = Path(spec)
    if not path.exists():
        hint = "an image, a folder of images, an .npz file or seed:N"
        raise UsageError("EA0140", f"{path}: no such data", hints=[hint])
    points = cloud_input(inputs)
    if points is not None:
        return _clouds(path, points, samples)
    if path.is_file() and path.suffix.lower() == ".npz":
        count, read = open_npz(path, inputs, samples)
        return Data(f"{count} samples of {path.name}", count, read)
    return _images(path, inputs, samples)


def seeded_images(seed: int | str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return natural-looking normalised images [n, 3, h, w]: structure at eight scales, mostly grey."""
    return np.stack([_image(f"{seed}/{index}", *shape[1:]) for index in range(shape[0])])


def seeded_feeds(
    seed: int | str, inputs: Sequence[TensorSpec], size: Callable[[Dim], int] = lambda dim: dim.opt or dim.min or 1
) -> dict[str, NDArray[Any]]:
    """Return one input per spec that depends on `seed` alone; `size` picks the size of a dimension."""
    points = cloud_input(inputs)
    if points is not None:
        return detection.seeded_feeds(seed, points)
    return {spec.name: seeded_input(seed, [size(dim) for dim in spec.dims], spec.dtype) for spec in inputs}


def seeded_input(seed: int | str, shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """Return an input that depends on `seed` alone: images where the shape is theirs, noise, or integers 0 and 1."""
    if len(shape) == 4 and shape[1] == 3 and dtype.startswith("float"):
        return seeded_images(seed, shape).astype(dtype)
    numbers = noise(f"input/{seed}", shape)
    return numbers.astype(dtype) if dtype.startswith("float") else (numbers > 0).astype(dtype)


def read_labels(path: str | Path) -> list[str]:
    """Return class names by index: one per line, or JSON (a list, or names or [id, name] by index). Raises EA0144."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text) if path.suffix.lower() == ".json" else text.rstrip().splitlines()
        if not isinstance(entries, (list, dict)):
            raise ValueError("a JSON list or object is wanted")
        names = [entries[str(index)] for index in range(len(entries))] if isinstance(entries, dict) else entries
    except (OSError, ValueError) as error:
        raise UsageError("EA0144", f"{path}: cannot be read as class names: {error}") from error
    except KeyError as error:
        raise UsageError("EA0144", f"{path}: class {error.args[0]} has no name") from error
    if not names:
        raise UsageError("EA0144", f"{path}: holds no class name")
    return [str(name[-1]) if isinstance(name, list) and name else str(name).strip() for name in names]


def _seed(spec: str) -> int:
    try:
        return int(spec.removeprefix("seed:"))
    except ValueError:
        raise UsageError("EA0140", f"{spec}: seed:N wants an integer") from None


def _seeded(seed: int, inputs: Sequence[TensorSpec], count: int) -> Data:
    def samples() -> Iterator[Sample]:
        for index in range(count):
            name = f"{seed}/{index}"
            yield f"seed:{name}", seeded_feeds(name, inputs)

    return Data(f"{count} seeded samples (seed {seed})", count, samples, seeded=True)


def _images(path: Path, inputs: Sequence[TensorSpec], limit: int | None) -> Data:
    """Return samples of one image, or of as many as the batch of the input has."""
    spec, preprocess = _image_input(inputs)
    batch, _, height, width = spec.shape()
    files = list_files(path, SUFFIXES, "images") if path.is_dir() else [path]
    count = min(limit or len(files), -(-len(files) // batch))
    chosen = _spread(files, count * batch)
    root = path if path.is_dir() else path.parent

    def samples() -> Iterator[Sample]:
        for index in range(count):
            group = chosen[index * batch : (index + 1) * batch]
            arrays = [load_image(file, preprocess, (height, width)) for file in group]
            name = ", ".join(file.relative_to(root).as_posix() for file in group)
            yield name, {spec.name: np.concatenate(arrays).astype(spec.dtype, copy=False)}

    return Data(f"{len(set(chosen))} of {len(files)} images in {path.name}", count, samples)


def _clouds(path: Path, spec: TensorSpec, limit: int | None) -> Data:
    """Return samples of one point cloud or of those in a folder; points beyond the capacity are left out."""
    files = list_clouds(path) if path.is_dir() else [path]
    count = min(limit or len(files), len(files))
    chosen = _spread(files, count)
    root = path if path.is_dir() else path.parent
    most, columns = spec.shape()
    lost: dict[str, str] = {}

    def samples() -> Iterator[Sample]:
        for file in chosen:
            name = file.relative_to(root).as_posix()
            feeds, points = detection.pack(load_cloud(file, columns), spec)
            if points > most:
                lost[name] = detection.loss("points", points, most)
            yield name, feeds

    return Data(f"{count} of {len(files)} point clouds in {path.name}", count, samples, lost=lost)


def _image_input(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, Mapping[str, Any]]:
    """Return the only input, which must be an image, and how an image becomes it."""
    if len(inputs) == 1 and inputs[0].preprocess is not None and len(inputs[0].dims) == 4:
        return inputs[0], inputs[0].preprocess
    names = ", ".join(spec.name for spec in inputs)
    hint = f"give an .npz file with {names}, samples along the first axis"
    raise UsageError("EA0143", f"this model takes no image file (inputs: {names})", hints=[hint])


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """Return `count` files evenly over all, so that few of them still cover many class folders; short lists repeat."""
    if count >= len(files):
        return [files[index % len(files)] for index in range(count)]
    return [files[index * len(files) // count] for index in range(count)]


def _image(name: str, channels: int, height: int, width: int) -> NDArray[np.float32]:
    total = 0.4 * noise(f"image/{name}/offset", (channels, 1, 1)) + np.zeros((channels, height, width))
    for cell, amplitude in _SCALES:
        shape = (-(-height // cell) + 1, -(-width // cell) + 1)
        shared = noise(f"image/{name}/{cell}/shared", (1, *shape))
        own = noise(f"image/{name}/{cell}/own", (channels, *shape))
        grid = 0.9 * shared + 0.4 * own
        total += amplitude * _enlarge(_enlarge(grid, cell, height, 1), cell, width, 2)
    return total.clip(_DARKEST, _BRIGHTEST).astype(np.float32)


def _enlarge(grid: NDArray[np.float64], cell: int, size: int, axis: int) -> NDArray[np.float64]:
    """Interpolate linearly between grid points `cell` pixels apart, to `size` pixels."""
    position = np.arange(size)
    index, share = position // cell, (position % cell) / cell
    share = share.reshape([-1 if place == axis else 1 for place in range(grid.ndim)])
    low, high = grid.take(index, axis), grid.take(index + 1, axis)
    return low + share * (high - low)
