"""Windows of a map: which pixels belong together, and the ONNX bodies of attention inside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.errors import UsageError
from edgeattn.kernels._statements import Statements

# ONNX Runtime's blocked depthwise convolution: 30 times slower where this does not divide the channels.
_BLOCK = 16


def check(op: str, q: Tensor, v: Tensor, num_heads: int, window: Sequence[int], interval: Sequence[int]) -> None:
    """Raise EA0110 unless whole windows cover the map and whole heads the channels."""
    for name, size, side, step in zip(("h", "w"), q.shape[2:], window, interval, strict=True):
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
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)


def _places(size: int, window: int, interval: int) -> np.ndarray:
    """Return the places along one axis of every window, [windows, slots]."""
    step = interval or size // window
    return np.arange(size).reshape(-1, window, step).transpose(0, 2, 1).reshape(-1, window)


def attention_body(
    dims: Mapping[str, int | None], attributes: Mapping[str, Any], dtype: str, intervals: Sequence[Sequence[int]]
) -> str:
    """Return the statements of the attention summed over the partitions with these intervals."""
    heads, window, scale = attributes["num_heads"], attributes["window"], attributes["scale"]
    body = _Body(heads, scale, dtype)
    height, width, e = dims["h"], dims["w"], dims["e"]
    if height is None or width is None:
        body.any_map(dims["c"], e, window, intervals)
    elif [height, width] == list(window):
        body.one_window(dims["c"], e, height, width, len(intervals))
    else:
        body.known_map(dims["c"], e, [window_pixels(height, width, window, each) for each in intervals], height, width)
    return str(body)


class _Body(Statements):
    """A body under construction: q, k and v are its inputs, out its output."""

    def __init__(self, heads: int, scale: float, dtype: str) -> None:
        super().__init__()
        self.heads, self.scale, self.dtype = heads, scale, dtype

    def one_window(self, c: int, e: int, height: int, width: int, partitions: int) -> None:
        """All partitions coincide: one attention, channels first, times their number."""
        q, k, v = (self._heads(name, size, height * width) for name, size in (("q", c), ("k", c), ("v", e)))
        weights = self._softmax(self.add("MatMul", self.add("Transpose", q, perm=[0, 1, 3, 2]), k))
        if partitions > 1:
            weights = self.add("Mul", weights, self.const(float(partitions), self.dtype))
        out = self.add("MatMul", v, self.add("Transpose", weights, perm=[0, 1, 3, 2]))  # [b, heads, e / heads, n]
        self.add("Reshape", out, self.const([0, e, height, width]), out="out")

    def _heads(self, name: str, channels: int, tokens: int) -> str:
        return self.add("Reshape", name, self.const([0, self.heads, channels // self.heads, tokens]))

    def known_map(self, c: int, e: int, partitions: Sequence[np.ndarray], height: int, width: int) -> None:
        """One gather lists the windows of all partitions, head by head; another brings every pixel's results back."""
        windows = np.concatenate(partitions)
        rows = windows[:, None, :] * self.heads + np.arange(self.heads)[:, None]  # [windows, heads, tokens]
        q, k, v = (
            self.add("Gather", self._tokens(name, size, height * width), self.const(rows), axis=1)
            for name, size in (("q", c), ("k", c), ("v", e))
        )  # [b, windows, heads, tokens, channels / heads]
        weights = self._softmax(self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 2, 4, 3])))
        found = self.add("Reshape", self.add("MatMul", weights, v), self.const([0, rows.size, e // self.heads]))
        places = [each.reshape(height, width, self.heads) for each in _returns(partitions, self.heads)]
        self._sum(found, e, places, height, width)

    def _tokens(self, name: str, channels: int, tokens: int) -> str:
        """Return the map as rows of one head of one pixel each."""
        last = self.add("Transpose", name, perm=[0, 2, 3, 1])
        return self.add("Reshape", last, self.const([0, tokens * self.heads, channels // self.heads]))

    def _sum(self, found: str, e: int, places: Sequence[np.ndarray], height: int, width: int) -> None:
        """Add what the partitions found for each pixel.

        Written as a depthwise convolution over interleaved rows, the sum comes out in the blocked layout that its two
        readers need, which saves them three reorders (2 to 3 % of EMOv2).
        """
        count = len(places)
        if count == 1 or e % _BLOCK:
            parts = [self.add("Gather", found, self.const(each), axis=1) for each in places]
            total = parts[0] if count == 1 else self.add("Sum", *parts)
            self._to_map(total, e, height, width, out="out")
            return
        rows = np.stack(places, 1).reshape(height * count, width, self.heads)
        stacked = self._to_map(self.add("Gather", found, self.const(rows), axis=1), e, height * count, width)
        ones = self.const(np.ones((e, 1, count, 1)), self.dtype)
        self.add("Conv", stacked, ones, group=e, kernel_shape=[count, 1], strides=[count, 1], out="out")

    def _to_map(self, tokens: str, e: int, height: int, width: int, out: str = "") -> str:
        rows = self.add("Reshape", tokens, self.const([0, height, width, e]))
        return self.add("Transpose", rows, perm=[0, 3, 1, 2], out=out)

    def any_map(self, c: int, e: int, window: Sequence[int], intervals: Sequence[Sequence[int]]) -> None:
        """Sizes known at run time only: the windows by Reshape and Transpose in eight dimensions."""
        sizes = {"b": self._size(0), "h": self._size(2), "w": self._size(3)}
        parts = [self._partition(c, e, sizes, window, interval) for interval in intervals]
        self.add("Sum", *parts, out="out")

    def _partition(
        self, c: int, e: int, sizes: Mapping[str, str], window: Sequence[int], interval: Sequence[int]
    ) -> str:
        rows = self._grid(sizes["h"], window[0], interval[0])  # blocks, window side, interval
        columns = self._grid(sizes["w"], window[1], interval[1])
        tokens = window[0] * window[1]
        q, k, v = (
            self._windows(name, size // self.heads, tokens, rows, columns)
            for name, size in (("q", c), ("k", c), ("v", e))
        )  # [b heads windows, tokens, channels / heads]
        weights = self._softmax(self.add("MatMul", q, self.add("Transpose", k, perm=[0, 2, 1])))
        found = self.add("MatMul", weights, v)
        split = self._shape([-1], rows[0], rows[2], columns[0], columns[2], rows[1], columns[1], [e // self.heads])
        back = self.add("Transpose", self.add("Reshape", found, split), perm=[0, 7, 1, 5, 2, 3, 6, 4])
        return self.add("Reshape", back, self._shape(sizes["b"], [e], sizes["h"], sizes["w"]))

    def _windows(self, name: str, channels: int, tokens: int, rows: Sequence[str], columns: Sequence[str]) -> str:
        split = self.add("Reshape", name, self._shape([-1, channels], *rows, *columns))
        grouped = self.add("Transpose", split, perm=[0, 2, 4, 5, 7, 3, 6, 1])
        return self.add("Reshape", grouped, self.const([-1, tokens, channels]))

    def _grid(self, size: str, window: int, interval: int) -> tuple[str, str, str]:
        """Return how one axis splits, outermost first."""
        if not interval:
            return self.const([1]), self.const([window]), self.add("Div", size, self.const([window]))
        blocks = self.add("Div", size, self.const([window * interval]))
        return blocks, self.const([window]), self.const([interval])

    def _size(self, axis: int) -> str:
        return self.add("Shape", "q", start=axis, end=axis + 1)

    def _shape(self, *parts: str | list[int]) -> str:
        return self.add("Concat", *(self.const(part) if isinstance(part, list) else part for part in parts), axis=0)

    def _softmax(self, scores: str) -> str:
        """Return the softmax of the scaled scores, in float32."""
        wide = scores if self.dtype == "float" else self.add("Cast", scores, to=1)
        if self.scale != 1.0:
            wide = self.add("Mul", wide, self.const(self.scale, "float"))
        weights = self.add("Softmax", wide, axis=-1)
        return weights if self.dtype == "float" else self.add("CastLike", weights, "q")


def _returns(partitions: Sequence[np.ndarray], heads: int) -> list[np.ndarray]:
    """Return, per partition, where the result of every pixel and head lies among [windows, heads, tokens]: [n, heads]."""
    found, start = [], 0
    for windows in partitions:
        tokens = windows.shape[1]
        window, slot = np.divmod(np.argsort(windows.reshape(-1)), tokens)
        found.append(((start + window)[:, None] * heads + np.arange(heads)) * tokens + slot[:, None])
        start += len(windows)
    return found
