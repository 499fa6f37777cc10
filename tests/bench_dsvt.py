"""Measure DSVT's transformer blocks against the authors' formulation under both stock exporters, side by side.

    python tests/bench_dsvt.py                     6000 and 20000 voxels
    python tests/bench_dsvt.py 6000 --rounds 5 --save

The authors' formulation gathers the features of every set, runs packed multi-head attention with a key padding mask on
them and scatters the rows back. It is exported by `torch.onnx.export`, with dynamo and with TorchScript, and runs in
PyTorch; ours is `edgeattn export --split blocks`. All take the same inputs and give the same output, float32; medians
of interleaved turns. The voxels are drawn so that a set holds as many as in the authors' deployment profile (20 000
voxels in 1000 and 700 sets of 36).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from bench_export import THREADS, count_nodes, interleave, record, scaled_error, session_options
from golden import fill
from torch import nn

from edgeattn.export import compile_module
from edgeattn.export.trace import quiet
from edgeattn.kernels._voxels import partition
from edgeattn.models._dsvt_blocks import Backbone3d, pillar_stages

# voxels: best stock / ours, torch / ours, at least
GOALS = {6000: (1.3, 2.0), 20000: (1.2, 2.0)}
# Share of occupied cells, so that sets are about as full as in the authors' profile.
DENSITY = 0.145
STAGES = pillar_stages(side=468, window=12, grown=24, set_size=36)


class GatheredLayer(nn.Module):
    """One encoder layer as the authors run it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer.win_attn
        self.norm = layer.norm

    def forward(self, x: torch.Tensor, position: torch.Tensor, inds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        members = x[inds]
        placed = members + position[inds]
        found, _ = self.inner.self_attn(placed, placed, members, key_padding_mask=mask)
        rows = x.index_put((inds.flatten(),), found.flatten(0, 1))
        y = self.inner.norm1(x + rows)
        y = self.inner.norm2(y + self.inner.linear2(nn.functional.gelu(self.inner.linear1(y))))
        return self.norm(x + y)


class Gathered(nn.Module):
    """The blocks of one stage as the authors run them; `inds` are int64, as stock exporters want them."""

    def __init__(self, backbone: Backbone3d) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatheredLayer(layer) for block in backbone.stage_0 for layer in block.encoder_list)
        self.norms = backbone.residual_norm_stage_0

    def forward(self, src, inds0, inds1, mask0, mask1, position):
        x, sets = src, ((inds0.long(), mask0), (inds1.long(), mask1))
        for number, norm in enumerate(self.norms):
            inds, mask = sets[number % 2]
            y = x
            for axis in range(2):
                y = self.layers[2 * number + axis](y, position[number, axis], inds[axis], mask[axis])
            x = norm(x + y)
        return x


def main() -> None:
    """Measure the sizes named on the command line and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voxels", nargs="*", type=int, default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=7, help="interleaved turns per backend")
    parser.add_argument("--save", action="store_true", help="write tests/results/bench_dsvt.{json,md}")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    backbone = Backbone3d(STAGES, 192)
    fill.fill_module(backbone)
    rows = []
    for voxels in options.voxels:
        rows.append(measure(backbone.eval(), voxels, options.rounds))
        print(line(rows[-1]), flush=True)
    if options.save:
        save(rows)


def measure(backbone: Backbone3d, voxels: int, rounds: int) -> dict[str, Any]:
    """Return sets, errors and the median milliseconds of every backend for one number of voxels."""
    inputs = example(backbone, voxels)
    authors = Gathered(backbone).eval()
    graphs = {
        "dynamo": stock_graph(authors, inputs, dynamo=True),
        "torchscript": stock_graph(authors, inputs, dynamo=False),
        "ours": ir.serde.serialize_model(compile_module(backbone.blocks_only(), inputs, outputs=["output"])),
    }
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    runs: dict[str, Callable[[], np.ndarray]] = {}
    for name, graph in graphs.items():
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        runs[name] = lambda session=session: session.run(None, feeds)[0]

    def eager() -> np.ndarray:
        with torch.inference_mode():
            return authors(*inputs.values()).numpy()

    runs["torch"] = eager
    expected = eager()
    return {
        "voxels": voxels,
        "sets": [inputs[f"set_voxel_inds_tensor_shift_{shift}"].shape[1] for shift in range(2)],
        "nodes": {name: count_nodes(graph) for name, graph in graphs.items()},
        "error": {name: scaled_error(run(), expected) for name, run in runs.items() if name != "torch"},
        "median_ms": interleave(runs, rounds),
    }


def example(backbone: Backbone3d, voxels: int) -> dict[str, torch.Tensor]:
    """Return the inputs of the blocks for voxels spread over a disc around the sensor."""
    random = np.random.default_rng(voxels)
    nx, ny, _ = STAGES[0].grid
    x, y = np.meshgrid(np.arange(nx) - nx / 2, np.arange(ny) - ny / 2, indexing="ij")
    disc = np.flatnonzero(np.hypot(x, y) < np.sqrt(voxels / (np.pi * DENSITY)))
    keys = np.sort(random.choice(disc, voxels, replace=False))
    coords = torch.from_numpy(np.stack([0 * keys, 0 * keys, keys % ny, keys // ny], 1))
    src = torch.from_numpy(random.standard_normal((voxels, 192), np.float32))
    inputs, places = {"src": src}, []
    sets = [partition(coords, STAGES[0].grid, STAGES[0].windows[i], STAGES[0].shifts[i], 36) for i in range(2)]
    for shift, (inds, _, place, _) in enumerate(sets):
        inputs[f"set_voxel_inds_tensor_shift_{shift}"] = inds.int()
        places.append(place)
    for shift, (inds, *_) in enumerate(sets):
        repeats = torch.zeros_like(inds, dtype=torch.bool)
        repeats[..., 1:] = inds[..., 1:] == inds[..., :-1]
        inputs[f"set_voxel_masks_tensor_shift_{shift}"] = repeats
    with torch.inference_mode():
        layers = backbone.input_layer.posembed_layers[0]
        embedded = [torch.stack([head(place) for head, place in zip(block, places, strict=True)]) for block in layers]
        return {**inputs, "pos_embed_tensor": torch.stack(embedded).clone()}


def stock_graph(module: nn.Module, inputs: Mapping[str, torch.Tensor], *, dynamo: bool) -> onnx.ModelProto:
    """Export with one of the stock exporters at fixed sizes."""
    extra = {"external_data": False, "verbose": False} if dynamo else {}
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.no_grad():
        path = Path(folder) / "stock.onnx"
        torch.onnx.export(
            module,
            tuple(tensor.clone() for tensor in inputs.values()),
            path,
            opset_version=20,
            input_names=list(inputs),
            dynamo=dynamo,
            **extra,
        )
        return onnx.load(path)


def line(row: dict[str, Any]) -> str:
    """Return one markdown row: measured (wanted)."""
    times, goals = row["median_ms"], GOALS.get(row["voxels"], (None, None))
    ratios = (min(times["dynamo"], times["torchscript"]) / times["ours"], times["torch"] / times["ours"])
    cells = [str(row["voxels"]), " + ".join(map(str, row["sets"]))]
    cells += [f"{times[name]:.0f}" for name in ("torch", "dynamo", "torchscript", "ours")]
    cells += [f"{ratio:.2f}" + (f" ({goal})" if goal else "") for ratio, goal in zip(ratios, goals, strict=True)]
    return "| " + " | ".join([*cells, f"{max(row['error'].values()):.1e}"]) + " |"


def save(rows: list[dict[str, Any]]) -> None:
    """Write the raw figures and the table."""
    head = (
        "| voxels | sets | torch eager, ms | dynamo, ms | TorchScript, ms | ours, ms | best stock / ours "
        "| torch / ours | largest error |"
    )
    record("bench_dsvt", "\n".join([head, "|---" * 9 + "|", *map(line, rows)]), threads=THREADS, rows=rows)


if __name__ == "__main__":
    main()
