"""The catalogue as tables and documents: models and ops, all of them or one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgeattn.model import MODELS, Model
from edgeattn.op import OPS, Op
from edgeattn.report import table


def model_entry(model: Model) -> dict[str, Any]:
    """Return what the catalogue says about a model."""
    entry = {name: getattr(model, name) for name in ("name", "family", "parameters", "macs", "top1", "paper", "source")}
    inputs = [asdict(spec) for spec in model.inputs]
    return {**entry, "inputs": inputs, "outputs": list(model.outputs), "checkpoint": asdict(model.checkpoint)}


def models() -> tuple[str, list[dict[str, Any]]]:
    """Return all models as a table and as entries."""
    rows = [("name", "family", "input", "parameters", "MACs", "top-1")]
    for model in MODELS:
        top1 = f"{model.top1:.1f} %" if model.top1 is not None else "-"
        rows.append((model.name, model.family, _sizes(model), f"{model.parameters / 1e6:.2f} M", _macs(model), top1))
    return table(rows), [model_entry(model) for model in MODELS]


def model(name: str) -> tuple[str, dict[str, Any]]:
    """Return one model as text and as an entry. Raises EA0101 with near names."""
    found = MODELS.get(name)
    checkpoint = found.checkpoint.url or "no public address: --weights FILE"
    lines = [
        f"{found.name}  ({found.family})",
        f"input       {_sizes(found)}",
        f"outputs     {', '.join(found.outputs)}",
        f"parameters  {found.parameters:,}".replace(",", " "),
        f"MACs        {_macs(found)}",
        f"top-1       {f'{found.top1:.1f} % (published, ImageNet-1k)' if found.top1 is not None else '-'}",
        f"paper       {found.paper}",
        f"source      {found.source}",
        f"weights     {checkpoint}",
    ]
    return "\n".join(lines), model_entry(found)


def op_entry(op: Op) -> dict[str, Any]:
    """Return what an op declares."""
    cases = [dict(case) for case in op.cases]
    entry = {"name": op.name, "onnx_name": op.onnx_name, "signature": op.text, "doc": op.doc}
    return {**entry, "kernel": "triton" if op.triton is not None else None, "cases": cases}


def ops() -> tuple[str, list[dict[str, Any]]]:
    """Return all ops as a table and as entries."""
    rows = [("name", "ONNX name", "kernel", "signature")]
    rows += [(op.name, op.onnx_name, "triton" if op.triton else "-", op.text) for op in OPS]
    return table(rows), [op_entry(op) for op in OPS]


def op(name: str) -> tuple[str, dict[str, Any]]:
    """Return one op as text, with the ONNX body of its first case, and as an entry. Raises EA0101 with near names."""
    found = OPS.get(name)
    entry = op_entry(found)
    body = _body(found, found.cases[0]) if found.cases else ""
    lines = [
        f"{found.name}  ({found.onnx_name}, domain edgeattn)",
        f"signature  {found.text}",
        f"meaning    {found.doc}",
    ]
    lines += [f"kernel     {entry['kernel'] or 'none yet: runs as its body'}"]
    lines += [f"case       {_words(case)}" for case in found.cases]
    return "\n".join([*lines, "body of the first case:", *[f"  {line}" for line in body.splitlines()]]), {
        **entry,
        "body": body,
    }


def _body(op: Op, case: Mapping[str, Any]) -> str:
    dims, attributes = op.split_case(case)
    return op.body(dims, attributes, "float")


def _words(case: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


def _sizes(model: Model) -> str:
    return ", ".join(f"{spec.name} {'x'.join(map(str, spec.dims))}" for spec in model.inputs)


def _macs(model: Model) -> str:
    return f"{model.macs / 1e9:.2f} G" if model.macs >= 1e9 else f"{model.macs / 1e6:.0f} M"
