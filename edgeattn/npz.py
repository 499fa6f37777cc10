"""Samples from an .npz file, read piece by piece: memory holds one sample, whatever the size of the file."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import UsageError
from edgeattn.tensors import TensorSpec

Sample = tuple[str, dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class _Array:
    """An array of the file, cut into `count` samples of `shape`, delivered as `target`."""

    dtype: np.dtype[Any]
    target: str
    shape: tuple[int, ...]
    count: int

    def read(self, stream: IO[bytes]) -> NDArray[Any]:
        """Return the next sample; nothing is ever unpickled."""
        size = math.prod(self.shape) * self.dtype.itemsize
        content = stream.read(size)
        if len(content) != size:
            raise ValueError("the array ends early")
        return np.frombuffer(content, self.dtype).reshape(self.shape).astype(self.target)


def open_npz(
    path: Path, inputs: Sequence[TensorSpec], limit: int | None = None
) -> tuple[int, Callable[[], Iterator[Sample]]]:
    """Return the number of samples in `path` and a function that yields them; arrays are named as the inputs.

    An array is [samples, *dims of the input], or [samples * batch, ...] in the rank of the input. Raises EA0142 for a
    damaged file, wrong names, shapes or kinds of numbers.
    """
    with _explained(path), zipfile.ZipFile(path) as archive:
        _check_names(path, archive.namelist(), inputs)
        arrays = {spec.name: _inspect(path, archive, spec) for spec in inputs}
    counts = {name: array.count for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise UsageError("EA0142", f"{path}: inputs differ in their number of samples: {counts}")
    count = min(next(iter(counts.values())), limit or math.inf)
    return int(count), lambda: _samples(path, arrays, int(count))


def _samples(path: Path, arrays: dict[str, _Array], count: int) -> Iterator[Sample]:
    with contextlib.ExitStack() as stack:
        with _explained(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            streams = {name: stack.enter_context(archive.open(f"{name}.npy")) for name in arrays}
            for stream in streams.values():
                _header(stream)
        for index in range(count):
            with _explained(path):
                sample = {name: array.read(streams[name]) for name, array in arrays.items()}
            yield f"{path.name}[{index}]", sample


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Name the file in whatever a damaged archive makes its readers raise."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError("EA0142", f"{path}: a damaged or foreign .npz file", why=str(error).split("\n")[0]) from error


def _check_names(path: Path, members: Sequence[str], inputs: Sequence[TensorSpec]) -> None:
    found = {name.removesuffix(".npy") for name in members}
    expected = {spec.name for spec in inputs}
    if found != expected:
        names = f"inputs are {', '.join(sorted(expected))}; the file has {', '.join(sorted(found)) or 'no array'}"
        raise UsageError("EA0142", f"{path}: {names}")


def _inspect(path: Path, archive: zipfile.ZipFile, spec: TensorSpec) -> _Array:
    """Return how the array of `spec` is cut into samples."""
    with archive.open(f"{spec.name}.npy") as stream:
        shape, column_major, dtype = _header(stream)
    where = f"{path}: {spec.name}"
    if column_major or dtype.hasobject:
        raise UsageError("EA0142", f"{where}: must be plain numbers in C order; save np.ascontiguousarray of it")
    if _kind(dtype) != _kind(np.dtype(spec.dtype)):
        raise UsageError("EA0142", f"{where}: is {dtype.name}, the model takes {spec.dtype}")
    rank, batch = len(spec.dims), spec.shape()[0] if spec.dims else 1
    piece, count = (shape[1:], shape[0]) if len(shape) == rank + 1 else ((batch, *shape[1:]), _div(shape, batch))
    fits = len(piece) == rank and all(dim.allows(size) for dim, size in zip(spec.dims, piece, strict=True))
    if not fits or not count:
        wanted = " x ".join(map(str, spec.dims))
        raise UsageError(
            "EA0142", f"{where}: has shape {list(shape)}, wanted samples of [{wanted}] along the first axis"
        )
    return _Array(dtype, spec.dtype, piece, count)


def _div(shape: Sequence[int], batch: int) -> int:
    """Return the number of whole batches along the first axis, 0 when one is left incomplete."""
    return shape[0] // batch if shape and shape[0] % batch == 0 else 0


def _kind(dtype: np.dtype[Any]) -> str:
    return {"u": "i"}.get(dtype.kind, dtype.kind)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, column-major flag and dtype of an .npy stream, and leave it at the first number."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(stream)
    return tuple(shape), bool(column_major), dtype
