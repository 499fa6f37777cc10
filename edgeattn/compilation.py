"""The state of one compilation, and what it leaves on disk: graph, reference, golden arrays, report, manifest."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeattn.bundle import write_json, write_manifest
from edgeattn.data import read_labels
from edgeattn.export.parity import Array, example_feeds, example_tensors, run_torch
from edgeattn.export.trace import trace
from edgeattn.progress import Progress, Stage
from edgeattn.source import Source
from edgeattn.target import Target
from edgeattn.tensors import Dim, TensorSpec

GOLDEN_SAMPLES = 3
_TOOLS = ("edgeattn", "torch", "onnx", "onnx-ir", "onnxscript", "triton", "tensorrt")


@dataclass
class Compilation:
    """What the stages hand on: the source, the options as resolved, the graph, and one record per finished stage."""

    source: Source
    targets: list[Target]
    precision: str
    options: dict[str, Any]
    progress: Progress
    graph: ir.Model | None = None
    precision_document: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    golden: list[tuple[dict[str, Array], list[Array]]] = field(default_factory=list)

    def record(self, stage: Stage, result: str, measured: Any = None, **facts: Any) -> None:
        """Add the manifest entry of a stage; figures that may differ between machines go to the report only."""
        stage.result = result
        self.stages.append({"name": stage.name, **facts})
        if measured is not None:
            self.measured[stage.name] = measured


def write_files(job: Compilation, folder: Path, labels: str | Path | None) -> None:
    """Write the graph, the precision document and what `validate` needs of the original."""
    from safetensors.torch import save

    assert job.graph is not None
    for key, value in (("producer_name", "edgeattn"), ("producer_version", _version("edgeattn"))):
        setattr(job.graph, key, value)
    ir.save(job.graph, folder / "model.onnx")
    write_json(folder / "precision.json", job.precision_document)
    (folder / "reference").mkdir()
    if job.source.model:
        state = {name: tensor.contiguous() for name, tensor in job.source.module.state_dict().items()}
        (folder / "reference" / "weights.safetensors").write_bytes(save(state))
    else:
        torch.export.save(_original(job.source), folder / "reference" / "model.pt2")
    if labels:
        (folder / "labels.txt").write_text("\n".join(read_labels(labels)) + "\n", encoding="utf-8")


def write_records(job: Compilation, folder: Path) -> None:
    """Write golden arrays, the export report and, last, the manifest over all files."""
    (folder / "golden").mkdir()
    outputs = _output_specs(job, folder / "model.onnx")
    golden = job.golden or [_golden(job.source, seed) for seed in range(GOLDEN_SAMPLES)]
    for file, names, column in (
        ("inputs", [s.name for s in job.source.inputs], 0),
        ("outputs", [s.name for s in outputs], 1),
    ):
        arrays = [list(sample[0].values()) if column == 0 else sample[1] for sample in golden]
        stacked = {name: np.stack([sample[i] for sample in arrays]) for i, name in enumerate(names)}
        np.savez(folder / "golden" / f"{file}.npz", allow_pickle=False, **stacked)
    report = {
        "schema": "edgeattn.export/1", "verdict": "pass", "exit_code": 0, "model": job.source.name,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "host": {"machine": platform.machine()},
        "stages": [{"name": s.name, "seconds": round(s.seconds, 3), "result": s.result} for s in job.progress.stages],
        "measured": job.measured,
    }  # fmt: skip
    (folder / "reports").mkdir()
    write_json(folder / "reports" / "export.json", report)
    write_manifest(folder, _manifest(job, outputs))


def _original(source: Source) -> torch.export.ExportedProgram:
    if source.program is not None:
        return source.program
    return trace(source.module, example_tensors(source.inputs), {spec.name: list(spec.dims) for spec in source.inputs})


def _golden(source: Source, seed: int) -> tuple[dict[str, Array], list[Array]]:
    feeds = example_feeds(source.inputs, seed=seed)
    return feeds, run_torch(source.module, feeds)


def _manifest(job: Compilation, outputs: Sequence[TensorSpec]) -> dict[str, Any]:
    counts: dict[str, int] = next((s["ops"] for s in job.stages if s["name"] == "translate"), {})
    tools = {name: _version(name) for name in _TOOLS}
    ops = [{"name": name, "version": 1, "count": n, "backends": ["body"]} for name, n in sorted(counts.items())]
    return {
        "name": f"{job.source.name}-{job.precision}",
        "model": job.source.identity,
        "inputs": [spec.as_dict() for spec in job.source.inputs],
        "outputs": [spec.as_dict() for spec in outputs],
        "precision": job.precision,
        **({"detector": asdict(job.source.detector)} if job.source.detector else {}),
        "ops": ops,
        "targets": [
            {"name": t.name, "kernels": "none" if not t.sm else "not built", "engine": "not built"} for t in job.targets
        ],
        "stages": job.stages,
        "tool_versions": tools,
        "options": job.options,
    }


def _output_specs(job: Compilation, path: Path) -> list[TensorSpec]:
    ranges = {dim.name: dim for spec in job.source.inputs for dim in spec.dims if dim.name}
    specs = []
    for value in ir.load(path).graph.outputs:
        assert value.shape is not None
        assert value.dtype is not None
        sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
        dims = tuple(Dim.fixed(s) if isinstance(s, int) else ranges.get(s, Dim(s)) for s in sizes)
        specs.append(TensorSpec(str(value.name), str(value.dtype.numpy()), dims))
    return specs


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
