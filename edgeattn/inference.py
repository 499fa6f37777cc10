"""Inputs through a bundle: images or arrays in, the best classes or saved outputs out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.bundle import Bundle, environment_error
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
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run every sample of `inputs` and return the `top` classes of each; `output` saves all outputs as `.npz`.

    Saved arrays are [samples, *dims of the output]. Names come from `labels`, else from the bundle. Raises what the
    bundle, the inputs and the backend raise, EA0105 for an existing output and EA0145 for labels that do not fit.
    """
    if top < 1:
        raise UsageError("EA0150", f"--top {top}: at least 1 is needed")
    bundle = Bundle.open(path)
    names = read_labels(labels) if labels else bundle.labels
    _check_output(output, force)
    sources = [open_data(source, bundle.inputs) for source in inputs]
    if dry_run:
        counts = ", ".join(source.description for source in sources)
        return Result(
            f"dry run: would run {counts} through {bundle.path}", {"bundle": str(bundle.path), "dry_run": True}
        )
    progress = progress or Progress(enabled=False)
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
    if names is not None and len(names) != len(row):
        raise UsageError("EA0145", f"{len(names)} labels for {len(row)} classes")
    powers = np.exp(row - row.max())
    shares = powers / powers.sum()
    best = np.argsort(-row, kind="stable")[:top]
    return [
        {"index": int(index), "probability": float(shares[index]), "label": names[index] if names else None}
        for index in best
    ]


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
