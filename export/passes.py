"""The ordered list of passes over the translated graph, and the loop that runs and checks them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
from onnxscript.rewriter import RewriteRule, pattern

from edgeattn.errors import AccuracyError
from edgeattn.export import fold, simplify

# A pass is exact but for the rounding of folded weights; the worst seen over all models is 3e-6.
TOLERANCE = 2e-5
Compare = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True)
class Pass:
    """A named rewrite of the graph in place, with what it keeps true; `run` returns how often it applied."""

    name: str
    invariant: str
    run: Callable[[ir.Model], int]


@dataclass(frozen=True)
class Record:
    """What one pass did: applications, node counts, seconds, and the output change relative to the largest output."""

    name: str
    rewrites: int
    before: int
    after: int
    seconds: float
    error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record without its time, which would make two exports differ."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}


def _rules(rules: Sequence[RewriteRule], commute: bool = False) -> Callable[[ir.Model], int]:
    """Return a pass that applies `rules` until none matches."""

    def run(model: ir.Model) -> int:
        return int(pattern.RewriteRuleSet(list(rules), commute=commute).apply_to_model(model))

    return run


def _fold_constants(model: ir.Model) -> int:
    before = node_count(model)
    # Folding a shape-dependent constant must not blow a small expression up into megabytes of weights.
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False, output_size_limit=1 << 20)
    return before - node_count(model)


def _clean(model: ir.Model) -> int:
    before = node_count(model)
    steps = (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )
    ir.passes.Sequential(*steps)(model)
    return before - node_count(model)


def _infer_shapes(model: ir.Model) -> int:
    """Fill in the shapes that the exporter's decompositions leave open when sizes are dynamic."""
    if any(_is_open(value) for node in model.graph for value in node.outputs):
        common.ShapeInferencePass(data_prop=True)(model)
    return 0


def _is_open(value: ir.Value) -> bool:
    return value.shape is None or any(isinstance(size, ir.SymbolicDim) and size.value is None for size in value.shape)


PASSES = (
    Pass("fold_constants", "what does not depend on the input is an initializer", _fold_constants),
    Pass("fold_norms", "no batch norm stands before a linear layer", _rules(fold.NORM_RULES)),
    Pass("fold_scales", "no constant factor follows a convolution", _rules(fold.SCALE_RULES, commute=True)),
    Pass("merge_residuals", "no depthwise convolution has a plain shortcut", _rules(fold.RESIDUAL_RULES, commute=True)),
    Pass("capture_attention", "attention is one node", _rules(simplify.CAPTURE_RULES, commute=True)),
    Pass("simplify", "a standard operator is one node", _rules(simplify.RULES, commute=True)),
    Pass("clean", "every node is reached, once", _clean),
    Pass("infer_shapes", "every value has a type and a shape", _infer_shapes),
)


def largest_difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Return the largest difference of any output, relative to the largest value of that output."""
    worst = 0.0
    for want, got in zip(expected, found, strict=True):
        if want.size:
            scale = float(np.abs(want).max()) or 1.0
            difference = np.abs(want.astype(np.float64) - got.astype(np.float64)).max()
            worst = max(worst, float(difference) / scale)
    return worst


def node_count(model: ir.Model) -> int:
    """Return the number of nodes of the main graph, constants left out."""
    return sum(node.op_type != "Constant" for node in model.graph.all_nodes())


def run_passes(
    model: ir.Model,
    evaluate: Callable[[ir.Model], list[np.ndarray[Any, Any]]] | None = None,
    dump: Path | None = None,
    passes: Sequence[Pass] = PASSES,
    compare: Compare | None = None,
) -> list[Record]:
    """Run the passes in order and return a record of each.

    `evaluate` returns the outputs of a graph: a pass that changed the graph is compared before and after (`compare`, by
    default the float64 difference relative to the largest output) and EA0701 names the one that moved them. `dump`
    receives the graph as text after every pass.
    """
    compare = compare or largest_difference
    expected = evaluate(model) if evaluate else []
    _dump(model, dump, 0, "translated")
    records = []
    for position, step in enumerate(passes, 1):
        before, start = node_count(model), time.perf_counter()
        rewrites = step.run(model)
        error = _judge(step, compare(expected, evaluate(model))) if evaluate and rewrites else None
        records.append(Record(step.name, rewrites, before, node_count(model), time.perf_counter() - start, error))
        _dump(model, dump, position, step.name)
    return records


def _judge(step: Pass, worst: float) -> float:
    if not worst <= TOLERANCE:
        raise AccuracyError(
            "EA0701",
            f"pass {step.name} changed the outputs by {worst:.1e} of the largest",
            why=f"limit {TOLERANCE:.0e}",
        )
    return worst


def _dump(model: ir.Model, folder: Path | None, position: int, name: str) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{node_count(model)} nodes\n"
    (folder / f"{position:02d}-{name}.txt").write_text(head + str(model.graph) + "\n")
