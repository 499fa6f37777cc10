"""Measure our exports against the stock exporter, PyTorch and OpenVINO, side by side in one run.

    python tests/bench_export.py                     every model of the table, into tests/results/
    python tests/bench_export.py shvit_s1 --rounds 5

"Stock" is `torch.onnx.export(dynamo=True)` of the eager model with every op as plain PyTorch (the scan as a token
loop); for mobilemamba_b4 it is the TorchScript exporter. Nodes are counted with all function bodies expanded and
constants as initializers, on both sides. Latency: batch 1, float32, medians of interleaved turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch
from golden import fill

from edgeattn.export import compile_module
from edgeattn.export.trace import quiet
from edgeattn.model import MODELS, Model
from edgeattn.op import decomposed

TABLE = {
    # name: nodes at most, stock/ours, torch/ours, OpenVINO on stock/ours on ONNX Runtime, at least
    "ghostnetv2_1.0": (305, 1.25, 5.5, 1.0),
    "shvit_s1": (250, 1.1, 4.5, 1.15),
    "shvit_s4": (350, 1.1, 2.6, 1.1),
    "emov2_1m": (340, 2.3, 3.4, 1.1),
    "emov2_5m": (390, 2.3, 2.6, 1.15),
    "mobilemamba_t2": (720, 10.0, 5.5, 3.5),
    "mobilemamba_s6": (800, 10.5, 4.2, 3.1),
    "mobilemamba_b1": (1150, 13.0, 3.9, 3.6),
    "mobilemamba_b4": (1600, 15.0, 3.0, None),
}
THREADS = 2
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure the models named on the command line and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(TABLE))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved turns per backend")
    parser.add_argument("--save", action="store_true", help="write tests/results/bench_export.{json,md}")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = []
    for name in options.models:
        rows.append(measure(MODELS.get(name), options.rounds))
        print(line(rows[-1]), flush=True)
    if options.save:
        save(rows)


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """Return nodes, seconds and the median milliseconds of every backend for one model."""
    module = fill.fill_module(model.build()).eval()
    spec = model.inputs[0]
    image = torch.from_numpy(fill.make_image(11, *spec.dims[2:]))
    graph, stock_seconds = stock_graph(model, module, image)
    start = time.perf_counter()
    ours = ir.serde.serialize_model(compile_module(module, {spec.name: image}, outputs=model.outputs, align=16))
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        runs, loads = backends(module, image, graph, ours, Path(folder))
        expected = runs["torch"]()
        errors = {name: scaled_error(run(), expected) for name, run in runs.items() if name != "torch"}
        milliseconds = interleave(runs, rounds)
    return {
        "model": model.name,
        "input": list(spec.dims),
        "nodes": {"stock": count_nodes(graph), "ours": count_nodes(ours)},
        "export_s": {"stock": stock_seconds, "ours": seconds},
        "load_s": loads,
        "error": errors,
        "median_ms": milliseconds,
    }


def stock_graph(model: Model, module: torch.nn.Module, image: torch.Tensor) -> tuple[onnx.ModelProto, float]:
    """Export with the stock exporter; return the graph and the seconds it took."""
    start = time.perf_counter()
    script = model.name == "mobilemamba_b4"
    with tempfile.TemporaryDirectory() as folder, quiet(), decomposed(), torch.no_grad():
        path = Path(folder) / "stock.onnx"
        extra = {"dynamo": False} if script else {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(module, (image,), path, opset_version=20, input_names=["image"], **extra)
        graph = onnx.load(path)
    return graph, time.perf_counter() - start


def backends(
    module: torch.nn.Module, image: torch.Tensor, stock: onnx.ModelProto, ours: onnx.ModelProto, folder: Path
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, float]]:
    """Return one callable per backend, and the session load times in seconds."""
    feed = {"image": image.numpy()}
    runs: dict[str, Callable[[], np.ndarray]] = {}
    loads = {}
    for name, graph in (("stock", stock), ("ours", ours)):
        onnx.save(graph, folder / f"{name}.onnx")
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(
            folder / f"{name}.onnx", session_options(), providers=["CPUExecutionProvider"]
        )
        loads[name] = time.perf_counter() - start
        runs[name] = lambda session=session: session.run(None, feed)[0]

    def eager() -> np.ndarray:
        with torch.inference_mode():
            return module(image).numpy()

    runs["torch"] = eager
    if compiled := openvino_model(folder / "stock.onnx"):
        runs["openvino"] = lambda: next(iter(compiled(feed).values()))
    return runs, loads


def session_options() -> onnxruntime.SessionOptions:
    """Return the options both graphs run with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return options


def openvino_model(path: Path) -> Any:
    """Compile the graph with OpenVINO in float32; None where the package is missing or the graph too large."""
    try:
        import openvino
    except ImportError:
        return None
    if len(onnx.load(path).graph.node) > 10_000:
        return None
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(str(path), "CPU", config)


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, turn_s: float = 0.25) -> dict[str, float]:
    """Run the backends in turns and return their median milliseconds.

    A pause lets the threads of the backend before stop spinning (they would take half of both cores for 60 ms), the
    first calls of a turn do not count, and every turn has the same number of calls: a slot of time would count fast
    periods more often than slow ones.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    calls = {name: max(3, round(turn_s / min(timed(run) for _ in range(3)))) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.1)
            for _ in range(3):
                run()
            samples[name] += [timed(run) for _ in range(calls[name])]
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def count_nodes(graph: onnx.ModelProto) -> int:
    """Return the number of nodes with function bodies expanded; constants are initializers on both sides."""
    flat = onnx.inliner.inline_local_functions(graph)
    return sum(node.op_type != "Constant" for node in flat.graph.node)


def scaled_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float(np.abs(value - expected).max() / np.abs(expected).max())


def ratios(row: dict[str, Any]) -> dict[str, float | None]:
    """Return how many times slower than ours each other backend is."""
    times = row["median_ms"]
    return {name: times[name] / times["ours"] if name in times else None for name in ("stock", "torch", "openvino")}


def line(row: dict[str, Any]) -> str:
    """Return one markdown row: measured (wanted)."""
    nodes, *wanted = TABLE.get(row["model"], (None, None, None, None))
    cells = [
        row["model"],
        f"{row['nodes']['stock'] or '-'} -> {row['nodes']['ours']}" + (f" ({nodes})" if nodes else ""),
    ]
    for value, goal in zip(ratios(row).values(), wanted, strict=True):
        cells.append((f"{value:.2f}" if value else "-") + (f" ({goal})" if goal else ""))
    cells += [f"{row['median_ms']['ours']:.2f}", f"{max(row['error'].values()):.1e}"]
    cells += [f"{row['export_s']['ours']:.0f}", f"{row['load_s']['ours']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def save(rows: list[dict[str, Any]]) -> None:
    """Write the raw figures and the table."""
    head = (
        "| model | nodes: stock -> ours | ORT: stock / ours | torch eager / ours | OpenVINO on stock / ours "
        "| ours, ms | largest error | export, s | load, s |"
    )
    rule = "|---" * 9 + "|"
    record("bench_export", "\n".join([head, rule, *map(line, rows)]), threads=THREADS, rows=rows)


def record(name: str, table: str, **facts: Any) -> None:
    """Write `facts` with the machine and versions, and the table, to tests/results/."""
    RESULTS.mkdir(exist_ok=True)
    versions = {package.__name__: package.__version__ for package in (torch, onnx, onnxruntime, np)}
    state = {"machine": platform.machine(), "versions": versions, **facts}
    (RESULTS / f"{name}.json").write_text(json.dumps(state, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
