"""The whole compiler: PyTorch model to bundle, stage by stage, each checked, timed and recorded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from edgeattn.acceptance import accept
from edgeattn.accuracy import MATCHED
from edgeattn.bundle import Bundle, check_output, writing
from edgeattn.capacity import Capacities, profile
from edgeattn.compilation import Compilation, write_files, write_records
from edgeattn.errors import AccuracyError, UnsupportedError, UsageError
from edgeattn.export.lower import edge_nodes, link_bodies
from edgeattn.export.parity import Array, example_feeds, example_tensors, run_graph
from edgeattn.export.passes import Record, largest_difference, node_count, run_passes
from edgeattn.export.precision import as_document, to_float16
from edgeattn.export.trace import deploy, trace
from edgeattn.export.translate import OPSET, output_names, translate
from edgeattn.model import MODELS
from edgeattn.progress import Progress
from edgeattn.source import resolve
from edgeattn.target import Target, get_target
from edgeattn.tensors import TensorSpec

STAGES = ("trace", "translate", "passes", "precision", "lower", "kernels")
PRECISIONS = ("fp32", "fp16", "bf16")


def export_model(
    model: str,
    *,
    output: str | Path | None = None,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    dims: Sequence[str] = (),
    max_points: int | None = None,
    max_voxels: Sequence[int] = (),
    max_sets: Sequence[int] = (),
    profile_from: str | Path | None = None,
    split: str | None = None,
    targets: Sequence[str] = ("portable",),
    precision: str | None = None,
    precision_plan: str | Path | None = None,
    keep_fp32: Sequence[str] = (),
    until: str = "kernels",
    check: bool = True,
    dump_passes: str | Path | None = None,
    allow_partial: bool = False,
    force: bool = False,
    dry_run: bool = False,
    labels: str | Path | None = None,
    progress: Progress | None = None,
) -> Bundle | dict[str, Any]:
    """Compile `model` into a bundle and return it, opened.

    `model` is a catalogue name, `package.module:factory` or a `.pt2` file; the options are those of `edgeattn export`.
    With `until` before "lower" or with `dry_run` nothing is written and a summary is returned. Raises the errors of
    `edgeattn.errors`; whatever happens, no half-written bundle is left.
    """
    if until not in STAGES:
        raise UsageError("EA0111", f"--until {until}: no such stage; stages are {', '.join(STAGES)}")
    boards = [get_target(name) for name in targets]
    chosen = _precision(precision, boards)
    plan = _read_plan(precision_plan)
    progress = progress or Progress(enabled=False)
    part = f"-{split}" if split else ""
    final = Path(output or f"{_base_name(model)}{part}-{chosen}.edgeattn")
    writes = not dry_run and STAGES.index(until) >= STAGES.index("lower")
    if writes:
        check_output(final, force)  # before a download or minutes of work
    capacities = Capacities(max_points, tuple(max_voxels), tuple(max_sets))
    if profile_from is not None:
        capacities = profile(MODELS.get(model), profile_from, progress, capacities)
    source = resolve(
        model,
        weights=weights,
        inputs=inputs,
        dims=dims,
        capacities=capacities,
        split=split,
        allow_partial=allow_partial,
        progress=progress,
    )
    options = {
        "model": model if source.model else source.name, "inputs": list(inputs), "dims": list(dims),
        **({"capacities": asdict(capacities)} if capacities else {}), **({"split": split} if split else {}),
        "targets": [board.name for board in boards], "precision": chosen, "keep_fp32": list(keep_fp32),
        "precision_plan": bool(plan), "weights": source.weights, "allow_partial": allow_partial, "check": check,
    }  # fmt: skip
    job = Compilation(source, boards, chosen, options, progress)
    if dry_run:
        return _summary(job, final, "dry run: nothing was done")
    if not writes:
        _to_graph(job, until, plan, keep_fp32, dump_passes)
        return _summary(job, final, f"stopped after {until}: no bundle was written")
    with writing(final, force) as folder:
        _to_graph(job, "precision", plan, keep_fp32, dump_passes)
        _lower(job)
        write_files(job, folder, labels)
        if until == "kernels":
            _kernels(job)
        if check:
            accept(job, folder / "model.onnx")
        write_records(job, folder)
    return Bundle.open(final)


def _to_graph(
    job: Compilation, until: str, plan: dict[str, str], keep_fp32: Sequence[str], dump: str | Path | None
) -> None:
    """Run the stages that turn the module into an unlinked ONNX graph, up to `until`."""
    steps = STAGES[: STAGES.index(until) + 1]
    program = _trace(job)
    if "translate" in steps:
        _translate(job, program)
    del program
    if "passes" in steps:
        _passes(job, Path(dump) if dump else None)
    if "precision" in steps:
        _lower_precision(job, plan, keep_fp32)


def _trace(job: Compilation) -> torch.export.ExportedProgram:
    source = job.source
    with job.progress.stage("trace", "torch.export") as stage:
        shapes = {spec.name: list(spec.dims) for spec in source.inputs}
        if source.program is not None:
            program = source.program
        else:
            align = min(target.channel_align for target in job.targets)
            program = trace(deploy(source.module, align), example_tensors(source.inputs), shapes)
        calls = sum(node.op == "call_function" for node in program.graph.nodes)
        job.record(stage, f"{calls} operations", operations=calls)
    return program


def _translate(job: Compilation, program: torch.export.ExportedProgram) -> None:
    with job.progress.stage("translate", f"opset {OPSET}") as stage:
        shapes = {spec.name: list(spec.dims) for spec in job.source.inputs}
        names = job.source.outputs or output_names(program)
        job.graph = translate(program, list(shapes), names, shapes)
        _refuse_baked_in(job.graph, job.source.inputs)
        counts = Counter(op.onnx_name for _, op in edge_nodes(job.graph))
        ours = "".join(f", {count} x {name}" for name, count in counts.items())
        nodes = node_count(job.graph)
        job.record(stage, f"{nodes} nodes{ours}", opset=OPSET, nodes=nodes, ops=dict(counts))


def _passes(job: Compilation, dump: Path | None) -> None:
    assert job.graph is not None
    with job.progress.stage("passes") as stage:
        feeds = example_feeds(job.source.inputs, seed=1)
        graph = job.graph
        records = run_passes(
            graph, lambda model: run_graph(model, feeds), dump, compare=lambda *both: _difference(job, *both)
        )
        rewrites = sum(record.rewrites for record in records)
        stage.what = f"{rewrites} rewrites"
        errors = [record.error for record in records if record.error is not None]
        verified = f"   (verified: {max(errors):.1e})" if errors else ""
        summary = f"{records[0].before} -> {records[-1].after} nodes{verified}"
        job.record(stage, summary, [_timed(record) for record in records], passes=[_plain(each) for each in records])


def _difference(job: Compilation, expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Return the largest relative difference, infinite where a detector loses more than a few candidates."""
    found, expected, share = job.source.in_one_order(found, expected)
    return largest_difference(expected, found) if share >= MATCHED else math.inf


def _timed(record: Record) -> dict[str, Any]:
    return {**record.as_dict(), "seconds": round(record.seconds, 3)}


def _plain(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.as_dict().items() if key != "error"}


def _lower_precision(job: Compilation, plan: dict[str, str], keep: Sequence[str]) -> None:
    assert job.graph is not None
    with job.progress.stage("precision", job.precision) as stage:
        if job.precision == "fp32":
            job.precision_document = as_document([], "fp32")
            job.record(stage, "as traced", precision="fp32")
            return
        own = job.source.model.keep_fp32 if job.source.model else ()
        choices = to_float16(job.graph, [*own, *keep], plan)
        _refuse_unknown_nodes(plan, {choice.node for choice in choices})
        kept = sum(choice.dtype == "float32" for choice in choices)
        casts = sum(node.op_type == "Cast" for node in job.graph.graph)
        job.precision_document = as_document(choices, job.precision)
        job.record(
            stage,
            f"{kept} of {len(choices)} nodes stay fp32, {casts} casts",
            precision=job.precision,
            kept=kept,
            casts=casts,
        )


def _lower(job: Compilation) -> None:
    assert job.graph is not None
    with job.progress.stage("lower") as stage:
        before = node_count(job.graph)
        link_bodies(job.graph)
        inner = {key: len([node for node in f if node.op_type != "Constant"]) for key, f in job.graph.functions.items()}
        expanded = before + sum(
            inner[node.op_identifier()] - 1 for node in job.graph.graph if node.op_identifier() in inner
        )
        bodies = len(inner)
        text = f"{bodies} {'body' if bodies == 1 else 'bodies'} linked, {expanded} nodes expanded"
        job.record(stage, text, bodies=sorted(key[1] for key in inner), nodes=before, expanded=expanded)


def _kernels(job: Compilation) -> None:
    with job.progress.stage("kernels") as stage:
        boards = [target.name for target in job.targets if target.sm]
        text = f"not built for {', '.join(boards)}: ops run as their bodies" if boards else "none for portable"
        job.record(stage, text, built=[])


def _refuse_baked_in(graph: ir.Model, specs: Sequence[TensorSpec]) -> None:
    baked = []
    for value, spec in zip(graph.graph.inputs, specs, strict=True):
        for size, dim in zip(value.shape or (), spec.dims, strict=True):
            if dim.name and isinstance(size, int):
                baked.append(f"{dim.name} = {size}")
    if baked:
        raise AccuracyError(
            "EA0703", f"dimensions were baked in: {', '.join(baked)}", hints=["leave out --dim for them"]
        )


def _refuse_unknown_nodes(plan: dict[str, str], nodes: set[str]) -> None:
    unknown = [name for name in plan if name not in nodes]
    if unknown:
        raise UsageError("EA0114", f"precision plan: {unknown[0]}: no such node ({len(unknown)} unknown)")


def _base_name(model: str) -> str:
    """Return what a bundle is called: the variant, the factory or the file."""
    return Path(model).stem if model.endswith(".pt2") else model.rpartition(":")[2]


def _precision(precision: str | None, targets: Sequence[Target]) -> str:
    chosen = precision or ("fp16" if any(target.precision == "fp16" and target.sm for target in targets) else "fp32")
    if chosen not in PRECISIONS:
        raise UsageError("EA0111", f"--precision {chosen}: not one of {', '.join(PRECISIONS)}")
    if chosen == "bf16":
        raise UnsupportedError(
            "EA0405", "bf16: convolutions need opset 22, which TensorRT 10.3 cannot read", hints=["--precision fp16"]
        )
    return chosen


def _read_plan(path: str | Path | None) -> dict[str, str]:
    """Return node name to dtype of an edited precision.json; `{}` without one."""
    if path is None:
        return {}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = {name: str(entry["dtype"]) for name, entry in document["nodes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("EA0114", f"{path}: not a precision plan: {error}") from error
    wrong = [name for name, dtype in plan.items() if dtype not in ("float16", "float32")]
    if wrong:
        raise UsageError("EA0114", f"{path}: {wrong[0]}: dtype is float16 or float32")
    return plan


def _summary(job: Compilation, final: Path, status: str) -> dict[str, Any]:
    return {
        "schema": "edgeattn.export/1", "verdict": "pass", "exit_code": 0, "model": job.source.name, "status": status,
        "output": str(final), "options": job.options, "inputs": [spec.as_dict() for spec in job.source.inputs],
        "stages": job.stages,
    }  # fmt: skip
