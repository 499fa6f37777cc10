"""The portable body of `set_partition`: a counting sort on the grid of windows, in ONNX text.

The map of columns (x, y), shifted and padded to whole windows, holds how many voxels each has. Sums of it give both
orders. y-major: the window rows above, and the columns to the left in this row. x-major is the order of the input, so
there a voxel's number, minus those of the windows below in the same column, tells how many precede it.
"""

from collections.abc import Mapping
from typing import Any

from edgeattn.errors import UnsupportedError, UsageError
from edgeattn.kernels._prefix import (
    FLOAT,
    INT32,
    exclusive,
    leading,
    levels,
    looked_up,
    numbers,
    product,
    row_sums,
    rows_of,
    written,
)
from edgeattn.kernels._statements import Statements
from edgeattn.kernels._voxels import moved


class PartitionBody:
    """The sizes of one configuration, and the steps that append statements to `s`."""

    def __init__(self, rows: int | None, attributes: Mapping[str, Any]) -> None:
        grid, window = attributes["grid"], attributes["window"]
        self.window, self.shift = window, moved(grid, window, attributes["shift"])
        reach = [(cells - 1 + step) // size + 1 for cells, step, size in zip(grid, self.shift, window, strict=True)]
        if reach[2] > 1:
            raise UnsupportedError("EA0402", f"set_partition: the body has one window along z; {window} on {grid}")
        self.reach, self.windows = reach[:2], product(reach)
        self.width, self.cells = reach[0] * window[0], self.windows * window[0] * window[1]
        self.height = min(grid[2], window[2])  # most voxels of a column
        self.set_size, self.max_sets = attributes["set_size"], attributes["max_sets"]
        most = product(window)
        if most * (most + self.set_size) >= 1 << 31:
            raise UsageError("EA0110", f"set_partition: ranks in a window of {window} overflow int32")
        self.count = rows  # None where it may change
        self.s = Statements()
        self.rows = rows_of(self.s, "coords", rows)
        self.spare = self.add("Sub", self.rows, self.whole(1))
        self.index = numbers(self.s, self.rows)
        self.valid = self.add("Less", self.index, self.add("Min", "num_voxels", self.spare))
        self.one = self.add("Cast", self.valid, to=INT32)  # to clear rows by a product: half the time of Where

    def text(self) -> str:
        """Append the whole body and return it."""
        cell, home, row, column = self._keys()
        above = self._above(cell) if self.height > 1 else ""
        left, lower, earlier, counts = self._sums(self._map(cell, above))
        starts, table, set_windows, total = self._windows(counts)
        y_major = self.add("Add", looked_up(self.s, left, cell), self._at(row, starts, lower))
        if above:
            y_major = self.add("Add", y_major, self.add("Cast", above, to=FLOAT))
        place = self._places(y_major, self._at(column, starts, earlier))
        self._sets(self._order(place), table, set_windows, total)
        self._slots(place, home, table)
        self.add("Cast", total, out="num_sets", to=INT32)
        return str(self.s)

    def add(self, *arguments: Any, **attributes: Any) -> str:
        """Append a node."""
        return self.s.add(*arguments, **attributes)

    def whole(self, values: Any) -> str:
        """Return the name of an int32 constant."""
        return self.s.const(values, "int32")

    def _keys(self) -> tuple[str, str, str, str]:
        """Append of every voxel [n]: its column on the map, its window, and its row and column among those of windows.

        Rows without voxel are sent beyond the map, and elsewhere to a place that exists. Writes the position.
        """
        s, (wx, wy, _), (sx, sy, _) = self.s, self.window, self.shift
        axes = s.add("Transpose", "coords", perm=[1, 0])
        places = s.add("Slice", axes, s.const([2]), s.const([4]), s.const([0]))
        places = s.add("Mul", places, self.one)
        places = s.add("Add", places, self.whole([[sy], [sx]])) if sx or sy else places
        sizes = self.whole([[wy], [wx]])
        numbers = s.add("Div", places, sizes)
        inside = s.add("Sub", places, s.add("Mul", numbers, sizes))
        flat = s.const([-1])
        y, x, window_y, window_x, iy, ix = (
            s.add("Reshape", part, flat) for pair in (places, numbers, inside) for part in s.split(pair, 0, 2)
        )
        position = self._joined(iy, wx, ix)
        if self.height > 1:
            z = s.add("Slice", axes, s.const([1]), s.const([2]), s.const([0]))
            position = self._joined(s.add("Reshape", z, flat), wx * wy, position)
        s.add("Mul", position, self.one, out="position")
        cell = s.add("Where", self.valid, self._joined(y, self.width, x), self.whole(self.cells))
        home = self._joined(window_x, self.reach[1], window_y)
        return cell, home, self._joined(home, wy, iy), self._joined(home, wx, ix)

    def _joined(self, major: str, size: int, minor: str) -> str:
        """Append major * size + minor."""
        return self.add("Add", self.add("Mul", major, self.whole(size)), minor)

    def _above(self, cell: str) -> str:
        """Append how many voxels of its column precede every voxel [n]."""
        s = self.s
        previous = s.add("Slice", cell, s.const([0]), s.const([-1]), s.const([0]))
        same = s.add("Equal", cell, s.add("Concat", self.whole([-1]), previous, axis=0))
        first = s.add("Where", same, self.whole(self.cells), cell)
        starts = written(s, self.whole(0), self.cells + 1, first, self.index, self.count)
        return s.add("Sub", self.index, looked_up(s, starts, cell))

    def _map(self, cell: str, above: str) -> str:
        """Append the number of voxels of every column, float32 [cells + wy * width].

        The last row of windows is no part of the map: it takes the rows without voxel.
        """
        s, weights = self.s, self.valid
        if above:
            following = s.add("Slice", cell, s.const([1]), s.const([1 << 40]), s.const([0]))
            same = s.add("Equal", cell, s.add("Concat", following, self.whole([-1]), axis=0))
            cell = s.add("Where", same, self.whole(self.cells), cell)
            weights = s.add("Add", above, self.whole(1))
        weights = s.add("Cast", weights, to=FLOAT)
        size = self.cells + self.window[1] * self.width
        return written(s, s.const(0.0, "float"), size, cell, weights, self.count)

    def _sums(self, columns: str) -> tuple[str, str, str, str]:
        """Append the sums over the map that place voxels, float32, windows in the order of their number.

        left [cells and more]: voxels of the window to the left of a column in its row; lower [windows, wy]: voxels of
        the window in rows before; earlier [windows, wx]: voxels in columns before, minus all voxels of the input before
        that column of the window; counts [windows].
        """
        s, (wx, wy, _), (nx, ny) = self.s, self.window, self.reach
        rows = s.add("Reshape", columns, s.const([-1, wx]))
        left = s.add("Reshape", row_sums(s, rows, wx, self.height), s.const([-1]))
        in_row = s.add("ReduceSum", rows, s.const([1]), keepdims=0)
        in_row = leading(s, s.add("Reshape", in_row, s.const([ny + 1, wy, nx])), ny)
        in_row = s.add("Transpose", in_row, perm=[2, 0, 1])
        lower = row_sums(s, s.add("Reshape", in_row, s.const([-1, wy])), wy, wx * self.height)
        in_column = s.add("Reshape", columns, s.const([ny + 1, wy, self.width]))
        in_column = leading(s, s.add("ReduceSum", in_column, s.const([1]), keepdims=0), ny)
        bound = wy * self.height
        in_column = s.add("Transpose", in_column, perm=[1, 0])  # the order of the input: x, then y
        before = s.add("Reshape", exclusive(s, in_column, [nx, wx, ny], bound), s.const([nx, wx, ny]))
        in_column = s.add("Reshape", in_column, s.const([nx, wx, ny]))
        before, in_column = (s.add("Transpose", each, perm=[0, 2, 1]) for each in (before, in_column))
        earlier = row_sums(s, s.add("Reshape", in_column, s.const([-1, wx])), wx, bound)
        earlier = s.add("Sub", earlier, s.add("Reshape", before, s.const([-1, wx])))
        counts = s.add("Reshape", s.add("ReduceSum", in_column, s.const([2]), keepdims=0), s.const([-1]))
        return left, lower, earlier, counts

    def _at(self, key: str, starts: str, offsets: str) -> str:
        """Append starts [windows, 1] + offsets [windows, w] for every voxel: float32 [n]."""
        both = self.add("Reshape", self.add("Add", offsets, starts), self.s.const([-1]))
        return looked_up(self.s, both, key)

    def _windows(self, counts: str) -> tuple[str, str, str, str]:
        """Append what is known of the windows.

        starts float32 [windows, 1]: voxels in the windows before; table int32 [4, windows]: the same, count (1 where
        none), places in its sets (also where empty), places before; the window of every set [max_sets]; all sets [1].
        """
        s, size = self.s, self.whole(self.set_size)
        count = s.add("Cast", counts, to=INT32)
        sets = s.add("Div", s.add("Add", count, self.whole(self.set_size - 1)), size)
        used = s.add("Greater", count, self.whole(0))
        rows = [s.add("Cast", each, to=FLOAT) for each in (sets, used)]
        before = exclusive(s, s.add("Concat", counts, *rows, axis=0), self.reach, product(self.window))
        start, first_set, ordinal = s.split(before, 0, 3)
        first_set, ordinal = (s.add("Cast", each, to=INT32) for each in (first_set, ordinal))
        parts = [
            s.add("Cast", start, to=INT32),
            s.add("Max", count, self.whole(1)),
            s.add("Mul", s.add("Max", sets, self.whole(1)), size),
            s.add("Mul", first_set, size),
        ]
        table = s.add("Reshape", s.add("Concat", *parts, axis=0), s.const([4, self.windows]))
        total = s.add("ReduceSum", sets, s.const([0]), keepdims=1)
        starts = s.add("Reshape", start, s.const([-1, 1]))
        return starts, table, self._set_windows(used, first_set, ordinal), total

    def _set_windows(self, used: str, first_set: str, ordinal: str) -> str:
        """Append the window of every set [max_sets]: mark where windows begin, count the marks, look the window up."""
        s, most = self.s, self.max_sets
        none = s.const(0.0, "float")
        factors = levels(most + 1)
        begins = s.add("And", used, s.add("Less", first_set, self.whole(most)))
        places = s.add("Where", begins, first_set, self.whole(most))
        values = s.add("Cast", begins, to=FLOAT)
        marks = written(s, none, product(factors), places, values, self.windows)
        passed = s.add("Add", exclusive(s, marks, factors, 1), marks)  # occupied windows up to this set's
        current = s.add("Max", s.add("Sub", leading(self.s, passed, most), s.const(1.0, "float")), none)
        places = s.add("Where", used, ordinal, self.whole(self.windows))
        values = numbers(s, self.whole(self.windows))
        listed = written(s, self.whole(0), self.windows + 1, places, values, self.windows)
        return looked_up(s, listed, s.add("Cast", current, to=INT32))

    def _places(self, y_major: str, earlier: str) -> str:
        """Append the places in both orders, int32 [2, n]: a row without voxel has its own, behind those of voxels."""
        s, index = self.s, self.add("Cast", self.index, to=FLOAT)
        y_major = s.add("Where", self.valid, y_major, index)
        x_major = s.add("Add", s.add("Mul", earlier, s.add("Cast", self.valid, to=FLOAT)), index)
        place = s.add("Cast", s.add("Concat", y_major, x_major, axis=0), to=INT32)
        return s.add("Reshape", place, s.const([2, -1]))

    def _order(self, place: str) -> str:
        """Append the rows in both orders, int32 [2 * n]: every place is written once, the last by the last row."""
        s = self.s
        place = s.add("Add", place, s.add("Mul", self.rows, self.whole([[0], [1]])))
        index = s.add("Concat", self.index, self.index, axis=0)
        return s.add("ScatterElements", index, s.add("Reshape", place, s.const([-1])), index, axis=0)

    def _sets(self, order: str, table: str, window: str, total: str) -> None:
        """Write the sets: floor((k*set_size + j) * count / (sets*set_size)) in the order of the window, k its set."""
        s, size = self.s, self.set_size
        params = s.add("Reshape", s.add("Gather", table, window, axis=1), s.const([4, -1, 1]))
        start, count, slots, before = (s.add("Squeeze", each, s.const([0])) for each in s.split(params, 0, 4))
        number = s.add("Reshape", numbers(s, self.whole(self.max_sets)), s.const([-1, 1]))
        live = s.add("Less", number, total)
        start = s.add("Where", live, start, self.spare)
        count = s.add("Mul", count, s.add("Cast", live, to=INT32))  # all entries of an unused set are the spare one
        first = s.add("Mul", s.add("Sub", s.add("Mul", number, self.whole(size)), before), count)
        entry = s.add("Add", s.add("Mul", self.whole([list(range(size))]), count), first)
        place = s.add("Add", s.add("Div", entry, slots), start)
        place = s.add("Reshape", place, s.const([-1]))
        place = s.add("Concat", place, s.add("Add", place, self.rows), axis=0)
        s.add("Reshape", looked_up(s, order, place), s.const([2, self.max_sets, size]), out="inds")

    def _slots(self, place: str, home: str, table: str) -> None:
        """Write the flat place of every voxel's first entry: the first j with floor(j * count / slots) = its rank."""
        s = self.s
        rows = s.add("Add", home, self.whole([[each * self.windows] for each in range(4)]))
        params = looked_up(s, s.add("Reshape", table, s.const([-1])), s.add("Reshape", rows, s.const([-1])))
        start, count, slots, before = s.split(params, 0, 4)
        entry = s.add("Mul", s.add("Sub", place, start), slots)
        entry = s.add("Div", s.add("Add", entry, s.add("Sub", count, self.whole(1))), count)
        entry = s.add("Add", entry, before)
        kept = s.add("And", self.valid, s.add("Less", entry, self.whole(self.max_sets * self.set_size)))
        s.add("Mul", entry, s.add("Cast", kept, to=INT32), out="slot")
