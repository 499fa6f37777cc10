"""Inputs through a bundle: images or arrays in, the best classes or saved outputs out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.boxes import FIELDS, Detections
from edgeattn.bundle import Bundle, environment_error
from edgeattn.clouds import list_clouds
from edgeattn.console import Result
from edgeattn.data import open_data, read_labels
from edgeattn.errors import UsageError
from edgeattn.progress import Progress
from edgeattn.session import Session, load

_FEWEST_CLASSES = 2


def run_inputs(
    path: Path,
    inputs: Sequence[Path],
    *,
    backend: str | None = None,
    top: int = 5,
    labels: Path | None = None,
    output: Path | None = None,
    threads: int | None = None,
    strict_capacity: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run every sample of `inputs` and return the `top` classes of each; `output` saves all outputs as `.npz`.

    A detector gives the `top` best boxes instead, and saves boxes, scores and labels of each cloud; a cloud that does
    not fit its capacities raises EA0148 with `strict_capacity`. Other arrays are [samples, *dims of the output]. Names
    come from `labels`, else from the bundle. Raises what the bundle, the inputs and the backend raise, EA0105 for an
    existing output and EA0145 for labels that do not fit.
    """
    if top < 1:
        raise UsageError("EA0150", f"--top {top}: at least 1 is needed")
    bundle = Bundle.open(path)
    names = read_labels(labels) if labels else bundle.labels
    _check_output(output, force)
    if strict_capacity and not bundle.detector:
        raise UsageError("EA0115", f"--strict-capacity: {bundle.path} takes no point clouds")
    sources = [open_data(source, bundle.inputs) for source in inputs]
    if dry_run:
        counts = ", ".join(source.description for source in sources)
        return Result(
            f"dry run: would run {counts} through {bundle.path}", {"bundle": str(bundle.path), "dry_run": True}
        )
    progress = progress or Progress(enabled=False)
    if bundle.detector:
        return _run_clouds(bundle, inputs, backend, threads, top, names, strict_capacity, output, progress)
    found: list[tuple[str, dict[str, np.ndarray]]] = []
    with load(bundle, backend, threads=threads) as session:
        with progress.stage("run", f"{session.info.backend} on {session.info.device}") as stage:
            for source in sources:
                found += [(name, _outputs(session, feeds)) for name, feeds in source]
            stage.result = f"{len(found)} samples"
        used = session.info.backend
    if output:
        _save(output, found)
    rows = [_classes(outputs, top, names) for _, outputs in found]
    document = {
        "bundle": str(bundle.path),
        "bundle_sha256": bundle.sha256,
        "backend": used,
        "results": [
            {"input": name, "outputs": _shapes(outputs), "top": row}
            for (name, outputs), row in zip(found, rows, strict=True)
        ],
        "output": str(output) if output else None,
    }
    return Result(_text(document, bundle), document)


def _run_clouds(
    bundle: Bundle,
    inputs: Sequence[Path],
    backend: str | None,
    threads: int | None,
    top: int,
    names: Sequence[str] | None,
    strict: bool,
    output: Path | None,
    progress: Progress,
) -> Result:
    """Run every point cloud through a detector: its best boxes, and what did not fit."""
    assert bundle.detector is not None
    if names is not None:
        _check_labels(names, len(bundle.detector.classes))
    files = [file for path in inputs for file in (list_clouds(path) if path.is_dir() else [path])]
    found: list[tuple[str, Detections]] = []
    with load(bundle, backend, threads=threads) as session:
        with progress.stage("run", f"{session.info.backend} on {session.info.device}") as stage:
            for number, file in enumerate(files, 1):
                boxes = session.detect(file, strict_capacity=strict)
                found.append((str(file), boxes if names is None else replace(boxes, names=tuple(names))))
                stage.fraction = number / len(files)
            stage.result = f"{len(found)} clouds"
        used = session.info.backend
    if output:
        parts = ("boxes", "scores", "labels")
        arrays = {f"{name}/{part}": getattr(boxes, part) for name, boxes in found for part in parts}
        with _replacing(output) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)
    document = {
        "bundle": str(bundle.path),
        "bundle_sha256": bundle.sha256,
        "backend": used,
        "results": [
            {"input": name, "count": len(boxes), "boxes": _best_boxes(boxes, top), "warnings": list(boxes.warnings)}
            for name, boxes in found
        ],
        "output": str(output) if output else None,
    }
    return Result(_boxes_text(document, bundle), document)


def _best_boxes(found: Detections, top: int) -> list[dict[str, Any]]:
    best = found.take(np.argsort(-found.scores, kind="stable")[:top])
    fields = FIELDS[: best.boxes.shape[1]]
    return [
        {"name": name, "label": int(label), "score": float(score), **dict(zip(fields, map(float, box), strict=True))}
        for name, label, score, box in zip(best.name, best.labels, best.scores, best.boxes, strict=True)
    ]


def _boxes_text(document: Mapping[str, Any], bundle: Bundle) -> str:
    lines = []
    if bundle.manifest["model"].get("weights_sha256") == "seeded":
        lines.append("seeded weights, not trained: the boxes mean nothing")
    for result in document["results"]:
        lines.append(f"{result['input']}: {result['count']} boxes")
        if result["boxes"]:
            head = [field for field in result["boxes"][0] if field in FIELDS]
            lines.append(f"  {'':22}{'score':>6}" + "".join(f"{field:>9}" for field in head))
            lines += [
                f"  {box['name']:22}{box['score']:6.2f}" + "".join(f"{box[field]:9.2f}" for field in head)
                for box in result["boxes"]
            ]
        lines += [f"  warning: {warning}" for warning in result["warnings"]]
    lines += [f"saved: {document['output']}"] if document["output"] else []
    return "\n".join(lines)


def _outputs(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    results = session(dict(feeds))
    values = results if len(session.outputs) > 1 else (results,)
    return {spec.name: value for spec, value in zip(session.outputs, values, strict=True)}


def _classes(outputs: Mapping[str, np.ndarray], top: int, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the best classes of the first row, with softmax probabilities; nothing for what is no classifier."""
    logits = next(iter(outputs.values()))
    if len(outputs) != 1 or logits.ndim != 2 or logits.shape[1] < _FEWEST_CLASSES:
        return []
    row = logits[0].astype(np.float64)
    if names is not None:
        _check_labels(names, len(row))
    powers = np.exp(row - row.max())
    shares = powers / powers.sum()
    best = np.argsort(-row, kind="stable")[:top]
    return [
        {"index": int(index), "probability": float(shares[index]), "label": names[index] if names else None}
        for index in best
    ]


def _check_labels(names: Sequence[str], classes: int) -> None:
    if len(names) != classes:
        raise UsageError("EA0145", f"{len(names)} labels for {classes} classes")


def _shapes(outputs: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in outputs.items()}


def _text(document: Mapping[str, Any], bundle: Bundle) -> str:
    lines = []
    if bundle.manifest["model"].get("weights_sha256") == "seeded":
        lines.append("seeded weights, not trained: the classes mean nothing")
    for result in document["results"]:
        lines.append(result["input"])
        for entry in result["top"]:
            lines.append(f"  {entry['index']:>5}  {entry['probability']:7.2%}  {entry['label'] or ''}".rstrip())
        if not result["top"]:
            lines += [f"  {name} {shape}" for name, shape in result["outputs"].items()]
    lines += [f"saved: {document['output']}"] if document["output"] else []
    return "\n".join(lines)


def _check_output(output: Path | None, force: bool) -> None:
    if output is None:
        return
    if output.suffix != ".npz":
        raise UsageError("EA0105", f"{output}: outputs are saved as .npz")
    if output.exists() and not force:
        raise UsageError("EA0105", f"{output}: already exists", hints=["--force replaces it"])
    if not output.parent.is_dir():
        raise UsageError("EA0105", f"{output.parent}: no such folder", hints=[f"mkdir -p {output.parent}"])


def _save(output: Path, found: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    arrays = {name: np.stack([outputs[name] for _, outputs in found]) for name in found[0][1]}
    with _replacing(output) as part, part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes the place of `output` when the block ends well."""
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, output)
    except OSError as error:
        known = environment_error(error, output, part)
        if known is None:
            raise
        raise known from error
    finally:
        part.unlink(missing_ok=True)
