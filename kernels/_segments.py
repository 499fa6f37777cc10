"""Rows grouped by an index: what the segment reductions share."""

import torch
from torch import Tensor

from edgeattn.kernels._statements import Statements


def spread(index: Tensor, x: Tensor) -> Tensor:
    """Repeat `index` [p] over the columns of x [p, c], as torch.scatter_reduce wants it."""
    return index.long().unsqueeze(1).expand_as(x)


def scatter_rows(text: Statements, rows: str, segments: int, columns: int, start: float, reduction: str) -> str:
    """State [segments + 1, columns] filled with `start`, into which float32 `rows` [p, columns] are reduced by index.

    Not ScatterND: ONNX Runtime divides its rows among threads and loses one of two updates that meet in a segment.
    ScatterElements visits them in order, in one dimension 2.5 times faster than in two.
    """
    column = text.const([list(range(columns))], "int32")
    first = text.add("Mul", text.add("Unsqueeze", "index", text.const([1])), text.const(columns, "int32"))
    places = text.add("Reshape", text.add("Add", first, column), text.const([-1]))
    filled = text.add("Expand", text.const(start, "float"), text.const([(segments + 1) * columns]))
    updates = text.add("Reshape", rows, text.const([-1]))
    found = text.add("ScatterElements", filled, places, updates, axis=0, reduction=reduction)
    return text.add("Reshape", found, text.const([segments + 1, columns]))


def sample_index(dims, attributes, generator):
    """Return an index with empty segments, shared ones and rows that point beyond the last."""
    places = torch.randint(0, attributes["segments"] + 1, (dims["p"],), generator=generator, dtype=torch.int32)
    return {"index": torch.where(places % 3 == 1, (places + 1) % (attributes["segments"] + 1), places)}
