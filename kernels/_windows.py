"""Windows of a map: which pixels belong together, and the ONNX bodies of attention inside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import UsageError
from edgeattn.kernels._statements import Statements


def check(op: str, q: Tensor, v: Tensor, num_heads: int, window: Sequence[int], interval: Sequence[int]) -> None:
    """Raise EA0110 unless whole windows cover the map and whole heads the channels."""
    for name, size, side, step in zip("hw", q.shape[2:], window, interval, strict=True):
        if size % (side * max(step, 1)):
            raise UsageError("EA0110", f"{op}: {name} = {size} is no multiple of {side * max(step, 1)}: pad the map")
    for name, size in (("c", q.shape[1]), ("e", v.shape[1])):
        if size % num_heads:
            raise UsageError("EA0110", f"{op}: {name} = {size} does not divide into {num_heads} heads")


def widened(x: Tensor) -> Tensor:
    """Return x in float32 at least: half precision ends at the inputs and the output."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def window_pixels(height: int, width: int, window: Sequence[int], interval: Sequence[int]) -> np.ndarray:
    """Return the row-major pixel numbers of every window, [windows, tokens]; interval 0 spreads over the whole map."""
    rows, columns = (_places(*axis) for axis in zip((height, width), window, interval, strict=True))
    pixels: np.ndarray = rows[:, None, :, None] * width + columns[None, :, None, :]
    return pixels.reshape(len(rows) * len(columns), -1)


def _places(size: int, window: int, interval: int) -> np.ndarray:
    """Return the places along one axis of every window, [windows, slots]."""
    step = interval or size // window
    places: np.ndarray = np.arange(size).reshape(-1, window, step).transpose(0, 2, 1)
    return places.reshape(-1, window)


def window_returns(partitions: Sequence[np.ndarray], heads: int) -> list[np.ndarray]:
    """Return, per partition, the row of every pixel and head among [windows, heads, tokens] of all: [pixels, heads]."""
    found, start = [], 0
    for windows in partitions:
        tokens = windows.shape[1]
        window, slot = np.divmod(np.argsort(windows.reshape(-1)), tokens)
        found.append(((start + window)[:, None] * heads + np.arange(heads)) * tokens + slot[:, None])
        start += len(windows)
    return found


def attention_body(
    dims: Mapping[str, Any], attributes: Mapping[str, Any], dtype: str, intervals: Sequence[Sequence[int]]
) -> str:
    """Return the statements of the attention summed over the partitions with these intervals, float32 inside."""
    out = "out" if dtype == "float" else "wide"
    body = _Body(dims["c"], dims["e"], attributes["num_heads"], attributes["scale"], out)
    inputs = list("qkv") if dtype == "float" else [body.add("Cast", name, to=1) for name in "qkv"]
    height, width, window = dims["h"], dims["w"], attributes["window"]
    if height is None or width is None:
        body.any_map(inputs, window, intervals)
    elif [height, width] == list(window):
        body.one_window(inputs, height, width, len(intervals))
    else:
        partitions = [window_pixels(height, width, window, interval) for interval in intervals]
        body.known_map(inputs, height, width, partitions)
    if dtype != "float":
        body.add("CastLike", out, "q", out="out")
    return str(body)


class _Body(Statements):
    """A body under construction for q and k with c channels, v with e; the result is called `out`."""

    def __init__(self, c: int, e: int, heads: int, scale: float, out: str) -> None:
        super().__init__()
        self.e, self.heads, self.scale, self.out = e, heads, scale, out
        self.widths = [c // heads, c // heads, e // heads]

    def one_window(self, inputs: Sequence[str], height: int, width: int, partitions: int) -> None:
        """All partitions coincide: one attention, channels first, times their number."""
        q, k, v = (
            self.add("Reshape", name, self.const([0, self.heads, size, height * width]))
            for name, size in zip(inputs, self.widths, strict=True)
        )
        weights = self._softmax(self.add("MatMul", self.add("Transpose", q, perm=[0, 1, 3, 2]), k))
        if partitions > 1:
            weights = self.add("Mul", weights, self.const(float(partitions), "float"))
        found = self.add("MatMul", v, self.add("Transpose", weights, perm=[0, 1, 3, 2]))  # [b, heads, e / heads, n]
        self.add("Reshape", found, self.const([0, self.e, height, width]), out=self.out)

    def known_map(self, inputs: Sequence[str], height: int, width: int, partitions: Sequence[np.ndarray]) -> None:
        """One gather lists the windows of all partitions, head by head; another brings every pixel's results back."""
        windows = np.concatenate(partitions)
        rows = windows[:, None, :] * self.heads + np.arange(self.heads)[:, None]  # [windows, heads, tokens]
        q, k, v = (
            self.add("Gather", self._rows(name, size, height * width), self.const(rows), axis=1)
            for name, size in zip(inputs, self.widths, strict=True)
        )  # [b, windows, heads, tokens, c / heads]
        weights = self._softmax(self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 2, 4, 3])))
        found = self.add("Reshape", self.add("MatMul", weights, v), self.const([0, rows.size, self.widths[2]]))
        returns = window_returns(partitions, self.heads)
        self._sum(found, [each.reshape(height, width, self.heads) for each in returns])

    def _rows(self, name: str, size: int, pixels: int) -> str:
        """Return a map as one row per pixel and head."""
        last = self.add("Transpose", name, perm=[0, 2, 3, 1])
        return self.add("Reshape", last, self.const([0, pixels * self.heads, size]))

    def _sum(self, found: str, returns: Sequence[np.ndarray]) -> None:
        """Add what the partitions found for each pixel.

        As a depthwise convolution over interleaved rows the sum comes out in the blocked layout that its readers need,
        which saves ONNX Runtime three reorders (2 to 3 % of EMOv2).
        """
        count, (height, width, heads) = len(returns), returns[0].shape
        rows = self.const(np.stack(returns, 1).reshape(height * count, width, heads))
        merged = self.add("Gather", found, rows, axis=1)  # [b, height count, width, heads, e / heads]
        merged = self.add("Reshape", merged, self.const([0, height * count, width, self.e]))
        if count == 1:
            self.add("Transpose", merged, perm=[0, 3, 1, 2], out=self.out)
            return
        stacked = self.add("Transpose", merged, perm=[0, 3, 1, 2])
        ones = self.const(np.ones((self.e, 1, count, 1)), "float")
        self.add("Conv", stacked, ones, group=self.e, kernel_shape=[count, 1], strides=[count, 1], out=self.out)

    def any_map(self, inputs: Sequence[str], window: Sequence[int], intervals: Sequence[Sequence[int]]) -> None:
        """Sizes known at run time only: windows by Reshape and Transpose in eight dimensions."""
        size = self.add("Shape", "q", start=2)
        sides = self.split(size, 0, 2)
        grids = [[self._grid(*axis) for axis in zip(sides, window, each, strict=True)] for each in intervals]
        if len(grids) == 1:
            self._partition(inputs, size, grids[0], self.out)
        else:
            self.add("Add", *(self._partition(inputs, size, grid) for grid in grids), out=self.out)

    def _partition(self, inputs: Sequence[str], size: str, grid: Sequence[Sequence[str]], out: str = "") -> str:
        (ny, wy, iy), (nx, wx, ix) = grid
        tokens = self.add("Mul", wy, wx)
        q, k, v = (
            self._windows(name, width, grid, tokens) for name, width in zip(inputs, self.widths, strict=True)
        )  # [b heads windows, tokens, c / heads]
        weights = self._softmax(self.add("MatMul", q, self.add("Transpose", k, perm=[0, 2, 1])))
        found = self.add("MatMul", weights, v)
        split = self.add("Reshape", found, self._shape([-1], ny, iy, nx, ix, wy, wx, [self.widths[2]]))
        back = self.add("Transpose", split, perm=[0, 7, 1, 5, 2, 3, 6, 4])
        return self.add("Reshape", back, self._shape([-1, self.e], size), out=out)

    def _windows(self, name: str, width: int, grid: Sequence[Sequence[str]], tokens: str) -> str:
        split = self.add("Reshape", name, self._shape([-1, width], *grid[0], *grid[1]))
        grouped = self.add("Transpose", split, perm=[0, 2, 4, 5, 7, 3, 6, 1])
        return self.add("Reshape", grouped, self._shape([-1], tokens, [width]))

    def _grid(self, size: str, window: int, interval: int) -> tuple[str, str, str]:
        """Return into what one axis splits: blocks, slots of a window, interval."""
        if not interval:
            return self.const([1]), self.const([window]), self.add("Div", size, self.const([window]))
        return self.add("Div", size, self.const([window * interval])), self.const([window]), self.const([interval])

    def _shape(self, *parts: str | list[int]) -> str:
        return self.add("Concat", *(self.const(part) if isinstance(part, list) else part for part in parts), axis=0)

    def _softmax(self, scores: str) -> str:
        if self.scale != 1.0:
            scores = self.add("Mul", scores, self.const(self.scale, "float"))
        return self.add("Softmax", scores, axis=-1)
