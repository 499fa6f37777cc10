"""PyTorch model to ONNX file: trace, translate, passes, precision, lower, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import nn

from edgeattn.export.lower import link_bodies
from edgeattn.export.passes import run_passes
from edgeattn.export.trace import Shapes, deploy, trace
from edgeattn.export.translate import output_names, translate


def compile_module(
    module: nn.Module | torch.export.ExportedProgram,
    inputs: Mapping[str, torch.Tensor],
    *,
    outputs: Sequence[str] = (),
    shapes: Shapes | None = None,
    align: int = 1,
) -> ir.Model:
    """Return the portable float32 graph of `module`, bodies linked, without writing anything.

    `inputs` are example tensors in the order of `forward`; a `Dim` in `shapes` stays dynamic; `align` is the multiple
    to which the deploy form pads split channels.
    """
    program = trace(deploy(module, align), inputs, shapes) if isinstance(module, nn.Module) else module
    model = translate(program, list(inputs), outputs or output_names(program), shapes)
    run_passes(model)
    return link_bodies(model)
