"""Measure DSVT's front end, points to bird's-eye map: our operators against plain PyTorch and its plain export.

    python tests/bench_dsvt_front.py               60 000 points, one thread
    python tests/bench_dsvt_front.py 20000 --save

"Partition" is points to voxels and sets of both shifts and orders: the exported operators in ONNX Runtime against the
dynamic functions that our PyTorch original runs, and against the authors' way in PyTorch (unique rows; three sorts for
each shift, and tables padded to the cells of a window). "Front end" is points to the input of the 2-D backbone, without
the blocks: the deploy form against the same steps as one writes them in PyTorch (scatter_reduce over the full width,
then a scatter into the grid and a three-axis transpose), exported by the same exporter, on the same voxel numbers.
Medians of interleaved turns, float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from bench_export import interleave, record, scaled_error
from golden import fill
from torch import Tensor, nn

from edgeattn.clouds import seeded_cloud
from edgeattn.export import compile_module
from edgeattn.kernels import bev_scatter, set_partition, voxelize
from edgeattn.kernels._voxels import partition, voxels_of, windows_of
from edgeattn.model import MODELS
from edgeattn.models.dsvt import CONFIGS, DSVT, Config

# dynamic partition / ours, authors' partition / ours, plain export / ours, at least
GOALS = (3.0, 3.0, 8.0)
POINTS, VOXELS, SETS = 65_536, 20_000, (1_500, 900)


class Partition(nn.Module):
    """Points to voxel numbers, coords, and the sets of both shifts, with fixed capacities."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def cut(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, size = self.config.low, self.config.size
        names = [f"{kind}_{axis}" for kind in ("low", "size") for axis in "xyz"]
        sizes = dict(zip(names, (*low, *size), strict=True))
        grid = list(self.config.stages[0].grid)
        return voxelize.op(points, num_points, **sizes, grid=grid, axes=3, max_voxels=VOXELS)

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, ...]:
        voxel, coords, count = self.cut(points, num_points)
        stage = self.config.stages[0]
        found = [voxel, coords, count]
        for window, shift, most in zip(stage.windows, stage.shifts, SETS, strict=True):
            where = {"grid": list(stage.grid), "window": list(window), "shift": list(shift)}
            found += set_partition.op(coords, count, **where, set_size=stage.set_size, max_sets=most)
        return tuple(found)


class FrontEnd(Partition):
    """Points to the bird's-eye map as the deploy form computes it, and the sets."""

    def __init__(self, detector: DSVT) -> None:
        super().__init__(detector.config)
        self.vfe = detector.vfe.deploy()

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, ...]:
        voxel, coords, count, *sets = super().forward(points, num_points)
        nx, ny, _ = self.config.stages[0].grid
        return (bev_scatter.op(self.vfe(points, voxel, coords), coords, count, height=ny, width=nx), *sets)


class PlainFrontEnd(Partition):
    """The same map and sets with plain scatters over the full width and a transpose of the grid."""

    def __init__(self, detector: DSVT) -> None:
        super().__init__(detector.config)
        self.augment, self.layers = detector.vfe.augment, detector.vfe.pfn_layers

    def forward(self, points: Tensor, num_points: Tensor) -> tuple[Tensor, ...]:
        voxel, coords, count, *sets = super().forward(points, num_points)
        index = voxel.long()
        first, second = self.layers
        x = first(self.augment(points, voxel, coords))
        x = second(torch.cat([x, self.largest(x, index)[index]], 1))
        rows = self.largest(x, index)
        nx, ny, _ = self.config.stages[0].grid
        cell = coords[:, 3].long() * ny + coords[:, 2].long()
        cell = torch.where(torch.arange(len(cell)) < count, cell, nx * ny)
        grid = rows.new_zeros(nx * ny + 1, rows.shape[1]).scatter(0, cell.unsqueeze(1).expand_as(rows), rows)
        return (grid[:-1].reshape(nx, ny, -1).permute(2, 1, 0).unsqueeze(0), *sets)

    def largest(self, x: Tensor, index: Tensor) -> Tensor:
        empty = x.new_zeros(VOXELS + 1, x.shape[1])
        return empty.scatter_reduce(0, index.unsqueeze(1).expand_as(x), x, "amax")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="?", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved turns per backend")
    parser.add_argument("--save", action="store_true", help="write tests/results/bench_dsvt_front.{json,md}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = CONFIGS[0]
    detector = fill.fill_module(MODELS.get(config.name).build()).eval()
    points = torch.zeros(POINTS, 5)
    cloud = torch.from_numpy(seeded_cloud(0, options.points, config.space))
    points[: len(cloud)] = cloud
    inputs = {"points": points, "num_points": torch.tensor([len(cloud)], dtype=torch.int32)}
    rows = [*measure_partition(config, inputs, cloud, options.rounds), measure_front(detector, inputs, options.rounds)]
    table = "\n".join(
        [
            "| step, compared with | that, ms | ours, ms | that / ours | results |",
            "|---" * 5 + "|",
            *map(line, rows, GOALS),
        ]
    )
    print(table)
    if options.save:
        record("bench_dsvt_front", table, threads=1, points=options.points, rows=rows)


def measure_partition(config: Config, inputs: dict[str, Tensor], cloud: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of the exported operators, of the dynamic functions and of the authors' way."""
    stage, run = config.stages[0], session(Partition(config), inputs)

    def sets(cut: Callable[..., Tensor], divide: Callable[..., Tensor]) -> list[Tensor]:
        coords = cut(cloud, config.low, config.size, stage.grid)
        pairs = zip(stage.windows, stage.shifts, strict=True)
        return [divide(coords, stage.grid, *pair, stage.set_size) for pair in pairs]

    runs = {
        "ours": run,
        "dynamic": lambda: sets(lambda *given: voxels_of(*given)[1], lambda *given: partition(*given)[0]),
        "authors": lambda: sets(unique_rows, padded_partition),
    }
    found = [inds[:, :count] for inds, count in zip(run()[3::4], run()[6::4], strict=True) for count in [int(count[0])]]
    for name in ("dynamic", "authors"):
        for inds, expected in zip(found, runs[name](), strict=True):
            assert np.array_equal(inds, expected.numpy()), f"the sets of {name} differ"
    times = interleave(runs, rounds)
    labels = {"dynamic": "partition, our PyTorch original", "authors": "partition, the authors' way in PyTorch"}
    return [{"step": label, "median_ms": {"plain": times[key], "ours": times["ours"]}} for key, label in labels.items()]


def unique_rows(cloud: Tensor, low: Sequence[float], size: Sequence[float], grid: Sequence[int]) -> Tensor:
    """Return the voxels [v, 4] (batch, z, y, x): unique over the first dimension, with inverse and counts."""
    cell = torch.floor((cloud[:, :3] - torch.tensor(low)) / torch.tensor(size)).int()
    x, y, z = cell[((cell >= 0) & (cell < torch.tensor(grid))).all(1)].long().unbind(1)
    nx, ny, nz = grid
    keys, _, _ = torch.unique((x * ny + y) * nz + z, return_inverse=True, return_counts=True, dim=0)
    return torch.stack([keys // (nx * ny * nz), keys % nz, keys // nz % ny, keys // (nz * ny)], 1)


def padded_partition(
    coords: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int], set_size: int
) -> Tensor:
    """Return the sets [2, sets, set_size], found by numbering the voxels of a window twice and matching the numbers."""
    number, (ix, iy, iz) = windows_of(coords, grid, window, shift)
    cells, (wx, wy, wz) = math.prod(window), window
    _, owner = torch.unique(number, return_inverse=True)
    count = torch.zeros(int(owner.max()) + 1, dtype=torch.int64).scatter_add_(0, owner, torch.ones_like(owner))
    sets = torch.ceil(count.double() / set_size).long()
    home = torch.repeat_interleave(torch.arange(len(sets)), sets)
    place = (torch.arange(len(home)) - (sets.cumsum(0) - sets)[home])[:, None] * set_size + torch.arange(set_size)
    place = place * count[home][:, None] // (sets[home][:, None] * set_size) + home[:, None] * cells
    arbitrary = number_in_window(owner)
    _, by_number = torch.sort(owner * cells + arbitrary)
    found = []
    for key in ((iy * wx + ix) * wz + iz, (ix * wy + iy) * wz + iz):
        _, by_key = torch.sort(owner * cells + key)
        ranks = torch.empty_like(arbitrary).scatter_(0, by_key, arbitrary[by_number])
        padded = torch.full((len(count) * cells,), -1)
        padded[ranks + cells * owner] = torch.arange(len(owner))
        found.append(padded[place])
    return torch.stack(found)


def number_in_window(owner: Tensor) -> Tensor:
    """Number the voxels of every window, in any order: an operator of its own in the authors' code."""
    order = torch.argsort(owner, stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = owner[order][1:] != owner[order][:-1]
    start = first.nonzero()[:, 0][first.cumsum(0) - 1]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - start)


def measure_front(detector: DSVT, inputs: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of both exported front ends."""
    runs = {"plain": session(PlainFrontEnd(detector), inputs), "ours": session(FrontEnd(detector), inputs)}
    error = scaled_error(runs["ours"]()[0], runs["plain"]()[0])
    return {"step": "front end, its plain export", "error": error, "median_ms": interleave(runs, rounds)}


def session(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Export `module` and return a call of it in ONNX Runtime, one thread."""
    graph = ir.serde.serialize_model(compile_module(module.eval(), inputs))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    runner = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: runner.run(None, feeds)


def line(row: dict[str, Any], goal: float) -> str:
    """Return one markdown row: measured (wanted)."""
    plain, ours = row["median_ms"]["plain"], row["median_ms"]["ours"]
    error = f"error {row['error']:.1e}" if "error" in row else "equal"
    return f"| {row['step']} | {plain:.1f} | {ours:.1f} | {plain / ours:.1f} ({goal:g}) | {error} |"


if __name__ == "__main__":
    main()
