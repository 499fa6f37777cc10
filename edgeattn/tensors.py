"""Input and output specifications, and the checks and conversions of the arrays that a session takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dim:
    """A dimension: fixed when `min == max`, else named with the sizes it may take (None where nothing is known)."""

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
    """An input or output of the graph; `preprocess` says how an image becomes this input."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    preprocess: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TensorSpec:
        """Read a manifest entry."""
        dims = tuple(Dim.from_dict(dim) for dim in entry["dims"])
        return cls(str(entry["name"]), str(entry["dtype"]), dims, entry.get("preprocess"))

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest entry."""
        entry: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "dims": [dim.as_dict() for dim in self.dims]}
        return entry | ({"preprocess": dict(self.preprocess)} if self.preprocess is not None else {})

    def shape(self) -> tuple[int, ...]:
        """Return the best size of every dimension (1 where nothing is known)."""
        return tuple(dim.opt or dim.min or 1 for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{' x '.join(map(str, self.dims))}]"
