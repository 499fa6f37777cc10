"""Input and output specifications, and the checks and conversions of the arrays that a session takes and gives."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.errors import UsageError


@dataclass(frozen=True)
class Dim:
    """A dimension: fixed when it has no name, else with the sizes it may take (None where nothing is known)."""

    name: str = ""
    min: int | None = None
    opt: int | None = None
    max: int | None = None

    @classmethod
    def fixed(cls, size: int) -> Dim:
        """Return the dimension that is always `size`."""
        return cls("", size, size, size)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Dim:
        """Read a manifest entry: `{"size": 224}` or `{"name": "batch", "min": 1, "opt": 1, "max": 8}`."""
        if "size" in entry:
            return cls.fixed(int(entry["size"]))
        return cls(str(entry["name"]), entry.get("min"), entry.get("opt"), entry.get("max"))

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest entry."""
        if not self.name:
            return {"size": self.min}
        ranges = {"min": self.min, "opt": self.opt, "max": self.max}
        return {"name": self.name, **{key: value for key, value in ranges.items() if value is not None}}

    def allows(self, size: int) -> bool:
        """Tell whether `size` lies in the range."""
        return (self.min is None or size >= self.min) and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        if not self.name:
            return str(self.min)
        return self.name if self.min is None else f"{self.name}={self.min}..{self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph; `preprocess` says how an image becomes this input, `cloud` how points do."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    preprocess: Mapping[str, Any] | None = None
    cloud: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TensorSpec:
        """Read a manifest entry."""
        dims = tuple(Dim.from_dict(dim) for dim in entry["dims"])
        return cls(str(entry["name"]), str(entry["dtype"]), dims, entry.get("preprocess"), entry.get("cloud"))

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest entry."""
        entry: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "dims": [dim.as_dict() for dim in self.dims]}
        sources = {"preprocess": self.preprocess, "cloud": self.cloud}
        return entry | {key: dict(value) for key, value in sources.items() if value is not None}

    def shape(self) -> tuple[int, ...]:
        """Return the best size of every dimension (1 where nothing is known)."""
        return tuple(dim.opt or dim.min or 1 for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{' x '.join(map(str, self.dims))}]"


class Outputs(tuple[Any, ...]):
    """Several outputs in order, also by name: `y[0]`, `y["boxes"]`, `y.keys()`, `dict(y)`."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], values: Iterable[Any]) -> Outputs:
        """Return `values` labelled with `names`."""
        outputs = cls(values)
        outputs.names = tuple(names)
        return outputs

    def keys(self) -> tuple[str, ...]:
        """Return the output names."""
        return self.names

    def values(self) -> tuple[Any, ...]:
        """Return the arrays."""
        return tuple(self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Return pairs of name and array."""
        return zip(self.names, self, strict=True)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file; nothing in it is ever unpickled. Raises EA0107 when it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UsageError("EA0107", f"{path}: does not exist") from error
    except Exception as error:
        # numpy raises zipfile, zlib, tokenizer and value errors for damaged archives.
        raise UsageError("EA0107", f"{path}: not a readable .npz of plain arrays", why=str(error)) from error


def in_order(specs: Sequence[TensorSpec], arguments: Sequence[Any]) -> list[Any]:
    """Return the arrays in the order of `specs`, from one mapping by name or from positions. Raises EA0130."""
    names = [spec.name for spec in specs]
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        given = arguments[0]
        if set(given) != set(names):
            raise UsageError("EA0130", f"inputs are {', '.join(names)}; got {', '.join(map(str, given)) or 'none'}")
        return [given[name] for name in names]
    if len(arguments) != len(names):
        raise UsageError("EA0130", f"expects {len(names)} inputs ({', '.join(names)}), got {len(arguments)}")
    return list(arguments)


def check(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> dict[str, int]:
    """Compare kind, dtype and shape of every array with its specification; return the size of every named dimension.

    Nothing is cast, padded or resized. Raises EA0131 (not an array), EA0132 (dtype) or EA0133 (shape).
    """
    sizes: dict[str, int] = {}
    for spec, array in zip(specs, arrays, strict=True):
        if kind_of(array) is None:
            raise UsageError(
                "EA0131", f"{spec.name}: expects a numpy, torch or DLPack array, got {type(array).__name__}"
            )
        if dtype_of(array) != spec.dtype:
            raise UsageError("EA0132", f"{spec.name}: expects {spec.dtype}, got {dtype_of(array)}")
        _check_shape(spec, tuple(array.shape), sizes)
    return sizes


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    found = " x ".join(map(str, shape))
    if len(shape) != len(spec.dims):
        raise UsageError("EA0133", f"{spec.name}: expects [{' x '.join(map(str, spec.dims))}], got [{found}]")
    for axis, (dim, size) in enumerate(zip(spec.dims, shape, strict=True)):
        if not dim.allows(size):
            hint = "dynamic sizes are chosen at export: --input and --dim"
            raise UsageError("EA0133", f"{spec.name}: axis {axis} must be {dim}, got [{found}]", hints=[hint])
        if dim.name and sizes.setdefault(dim.name, size) != size:
            raise UsageError(
                "EA0133", f"{spec.name}: axis {axis} ({dim.name}) is {size}, but {sizes[dim.name]} elsewhere"
            )


def kind_of(array: Any) -> str | None:
    """Return "numpy", "torch" or "dlpack", or None for what is no array."""
    if isinstance(array, np.ndarray):
        return "numpy"
    # A torch tensor cannot exist before torch has been imported.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    return "dlpack" if all(hasattr(array, name) for name in ("__dlpack__", "dtype", "shape")) else None


def dtype_of(array: Any) -> str:
    """Return the name of the dtype: "float32" for `np.float32` and `torch.float32`; byte-swapped arrays differ."""
    if isinstance(array, np.ndarray):
        return str(array.dtype.name if array.dtype.isnative else array.dtype.str)
    return str(array.dtype).rpartition(".")[2]


def to_numpy(name: str, array: Any) -> np.ndarray:
    """Return `array` as a contiguous numpy array, sharing memory where possible. Raises EA0134 off the CPU."""
    kind = kind_of(array)
    if kind == "numpy":
        return np.ascontiguousarray(array)
    device = str(array.device) if kind == "torch" else _dlpack_device(array)
    if device != "cpu":
        raise UsageError(
            "EA0134", f"{name}: lies on {device}, this session computes on the cpu", hints=["copy it first"]
        )
    found = array.detach().numpy() if kind == "torch" else np.from_dlpack(array)
    return np.ascontiguousarray(found)


def to_torch(name: str, array: Any, device: str) -> Any:
    """Return `array` as a torch tensor on `device`; only numpy arrays are copied there. Raises EA0134 otherwise."""
    import torch

    if isinstance(array, np.ndarray):
        # torch warns about read-only memory and refuses negative strides.
        shared = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
        return torch.from_numpy(shared).to(device)
    tensor = array.detach() if isinstance(array, torch.Tensor) else torch.utils.dlpack.from_dlpack(array)
    if tensor.device != torch.device(device):
        raise UsageError("EA0134", f"{name}: lies on {tensor.device}, this session computes on {device}")
    return tensor


def like(example: Any, result: Any) -> Any:
    """Return `result` (numpy or torch) as the kind of array that `example` is."""
    kind = kind_of(example)
    if kind == "torch":
        import torch

        return torch.from_numpy(result) if isinstance(result, np.ndarray) else result
    if kind == "numpy":
        return result if isinstance(result, np.ndarray) else result.cpu().numpy()
    namespace = getattr(example, "__array_namespace__", None)
    return namespace().from_dlpack(result) if namespace else result


def _dlpack_device(array: Any) -> str:
    kind, number = array.__dlpack_device__()
    return "cpu" if kind == 1 else f"device {kind}:{number}"
