"""Acceptance of an exported file: checker, types, target rules, parity with PyTorch, NVIDIA's parser and builder."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeattn.accuracy import band, least_share
from edgeattn.compilation import GOLDEN_SAMPLES, Compilation
from edgeattn.engine import rtx_check
from edgeattn.errors import AccuracyError, BuildError, UnsupportedError
from edgeattn.export.boundary import without_plugins
from edgeattn.export.check import check_graph, target_violations
from edgeattn.export.parity import Array, example_feeds, run_bytes, run_half, run_torch
from edgeattn.rounding import StoredAs
from edgeattn.source import Source
from edgeattn.tensors import TensorSpec


def accept(job: Compilation, path: Path) -> None:
    """Accept the written file: checker, types, target rules, parity with PyTorch, and a real parse and build."""
    assert job.graph is not None
    with job.progress.stage("check", "model.onnx vs PyTorch") as stage:
        check_graph(job.graph)
        _check_targets(job)
        job.graph = None  # the rest reads the file, and large models should not be held twice
        found = _parity(job, path.read_bytes())
        built = _build(path, job.source.inputs)
        if built["verdict"] == "fail":
            raise BuildError("EA0601", f"TensorRT-RTX: {built['reason']}", where="model.onnx")
        engine = f"builds ({built['layers']} layers)" if built["verdict"] == "pass" else "skipped"
        engine += "".join(f", {count} x {name} left to the plugin" for name, count in built.get("plugins", {}).items())
        agree = f", top-1 {found['top1']}" if found["top1"] else ""
        agree += f", {found['matched']:.1%} of boxes" if found["matched"] is not None else ""
        text = f"PASS  scaled err {found['scaled_err']:.1e} (band {found['band']:.1e}){agree}, TensorRT-RTX {engine}"
        checks = ["onnx checker", "value types", "target rules", "parity"]
        checks += ["tensorrt-rtx build"] if built["verdict"] == "pass" else []
        job.record(stage, text, {**found, "tensorrt_rtx": built}, checks=checks)


def _build(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Parse and build the file; nodes that are always plugins are left out, and named in the result."""
    shown, plugins = without_plugins(ir.load(path))
    if not plugins:
        return rtx_check(path, _profiles(inputs))
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        ir.save(shown, part)
        return {**rtx_check(part, _profiles(inputs)), "plugins": plugins}


def _check_targets(job: Compilation) -> None:
    assert job.graph is not None
    for target in job.targets:
        for found in target_violations(job.graph, target)[:1]:
            raise UnsupportedError(
                "EA0404",
                f"{found.op}: {found.reason} ({target.name}), used {found.count} times",
                where=found.module,
                hints=["register an op that covers it: edgeattn ops show single_head_attention is an example"],
            )


def _parity(job: Compilation, graph: bytes) -> dict[str, Any]:
    """Compare with PyTorch on three inputs, and at both ends of every dynamic range."""
    source = job.source
    feeds = [example_feeds(source.inputs, seed=seed) for seed in range(GOLDEN_SAMPLES)]
    if any(dim.name for spec in source.inputs for dim in spec.dims):
        feeds += [example_feeds(source.inputs, seed=0, size=end) for end in ("min", "max")]
    expected = [run_torch(source.module, feed) for feed in feeds]
    own, own_share = _own_error(job, feeds, expected)
    limit = band(job.precision, own)
    least = least_share(job.precision, own_share)
    errors, shares, agree, rows = [], [], 0, 0
    for feed, wanted in zip(feeds, expected, strict=True):
        found = run_bytes(graph, feed)
        error, share = _compare(source, found, wanted)
        errors.append(error)
        shares.append(share)
        if wanted[0].ndim == 2 and len(source.inputs) == 1:
            agree += int((found[0].argmax(1) == wanted[0].argmax(1)).sum())
            rows += len(wanted[0])
    job.golden += zip(feeds[:GOLDEN_SAMPLES], expected, strict=False)
    worst = max(errors)
    if not worst <= limit.limit:
        sizes = [list(array.shape) for array in feeds[errors.index(worst)].values()]
        raise AccuracyError("EA0704", f"scaled error {worst:.1e} at {sizes}, limit {limit.limit:.1e}", why=limit.source)
    if min(shares) < least.limit:
        few = f"only {min(shares):.1%} of the boxes are found, at least {least.limit:.1%} wanted"
        raise AccuracyError("EA0705", few, why=least.source)
    return {
        "scaled_err": worst,
        "band": limit.limit,
        "source": limit.source,
        "top1": f"{agree}/{rows}" if rows else "",
        "matched": min(shares) if source.detector else None,
    }


def _own_error(
    job: Compilation, feeds: Sequence[dict[str, Array]], expected: Sequence[list[Array]]
) -> tuple[float | None, float]:
    """Return the error of PyTorch itself at the graph's precision, None where there is none, and its share of boxes.

    Classifiers are measured on one input; clouds of different density differ more.
    """
    if job.precision != "fp16":
        return None, 1.0
    source, count = job.source, GOLDEN_SAMPLES if job.source.detector else 1
    run = _half(source)
    halves = [run(feed) for feed in feeds[:count]]
    own = [_compare(source, half, want) for half, want in zip(halves, expected, strict=False) if half is not None]
    worst = max((error for error, _ in own), default=float("inf"))
    # Where PyTorch itself overflows or has no such operator only the floor is left.
    return worst if np.isfinite(worst) else None, min((share for _, share in own), default=1.0)


def _half(source: Source) -> Callable[[dict[str, Array]], list[Array] | None]:
    """Return what runs PyTorch itself in float16, as far as it can."""
    if source.detector is None:
        return functools.partial(run_half, source.module)
    assert source.model is not None
    return functools.partial(run_torch, StoredAs(source.module, torch.float16, source.model.keep_fp32))


def _compare(source: Source, found: Sequence[Array], expected: Sequence[Array]) -> tuple[float, float]:
    """Return the largest scaled error of any output, and the share of boxes that both sides have."""
    ours, theirs, share = source.in_one_order(found, expected)
    return max(map(_scaled_error, ours, theirs)), share


def _scaled_error(found: Array, expected: Array) -> float:
    """Return RMS difference over RMS value; infinite for another shape or anything not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    scale = float(np.sqrt((wide**2).mean())) or 1.0
    return float(np.sqrt(((found.astype(np.float64) - wide) ** 2).mean())) / scale


def _profiles(specs: Sequence[TensorSpec]) -> dict[str, list[list[int]]]:
    """Return minimal, optimal and maximal shape of every input, when any size is dynamic."""
    if not any(dim.name for spec in specs for dim in spec.dims):
        return {}
    ends = ("min", "opt", "max")
    return {spec.name: [[int(getattr(dim, end)) for dim in spec.dims] for end in ends] for spec in specs}
