"""The verbs that list and show: models, ops and stored reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.console import Result
from edgeattn.options import Common, group, verb

_HELP = {
    "models": "The catalogue of models.",
    "ops": "The registered operators.",
    "report": "Stored reports: read, compare, render.",
}
APPS = {name: typer.Typer(rich_markup_mode=None) for name in _HELP}
for _name, _app in APPS.items():
    group(_app, _HELP[_name], hidden=True)
models, ops, report = APPS.values()

ReportPath = Annotated[Path, typer.Argument(metavar="REPORT", help="A report file, or a bundle for its latest.")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]


@verb(models, "models list", "edgeattn models list", configurable=False)
def models_list(common: Common) -> Result:
    """List all models with their sizes and published accuracy."""
    from edgeattn import catalogue

    text, entries = catalogue.models()
    return Result(text, {"models": entries})


@verb(models, "models show", "edgeattn models show shvit_s1", configurable=False)
def models_show(common: Common, name: Name) -> Result:
    """Show one model: input, size, paper, weights."""
    from edgeattn import catalogue

    return Result(*catalogue.model(name))


@verb(models, "models check", "edgeattn models check shvit_s1 shvit_s1.pth", configurable=False)
def models_check(
    common: Common,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint.")],
) -> Result:
    """Compare a weight file with a model, key by key; exit 2 when it does not fit."""
    from edgeattn import outcome
    from edgeattn.weights import check_weights

    return outcome.compared(name, check_weights(name, file))


@verb(ops, "ops list", "edgeattn ops list", configurable=False)
def ops_list(common: Common) -> Result:
    """List all operators: signature, ONNX name, kernel."""
    from edgeattn import catalogue

    text, entries = catalogue.ops()
    return Result(text, {"ops": entries})


@verb(ops, "ops show", "edgeattn ops show single_head_attention", configurable=False)
def ops_show(common: Common, name: Name) -> Result:
    """Show one operator: meaning, cases and ONNX body."""
    from edgeattn import catalogue

    return Result(*catalogue.op(name))


@verb(ops, "ops check", "edgeattn ops check shvit_s1 --target orin", configurable=False)
def ops_check(
    common: Common,
    model: Annotated[str, typer.Argument(help="A catalogue name, package.module:factory or a .pt2 file.")],
    input_: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=1x3x224x224")] = None,
    dim: Annotated[list[str] | None, typer.Option("--dim", metavar="NAME=MIN:MAX:OPT")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", help="portable, orin, thor, rtx ...")] = None,
) -> Result:
    """List the operators of MODEL and what each target refuses, without an export; exit 4 when one does."""
    from edgeattn.operations import check_operations

    text, document = check_operations(model, inputs=input_ or (), dims=dim or (), targets=target or ("portable",))
    return Result(text, document, document["exit_code"])


@verb(report, "report show", "edgeattn report show shvit_s1-fp32.edgeattn", configurable=False)
def report_show(common: Common, path: ReportPath) -> Result:
    """Show a stored report, or the latest one of a bundle."""
    from edgeattn.records import read
    from edgeattn.report import show

    found, _ = read(path)
    return Result(show(found), {**found, "exit_code": 0})


@verb(report, "report diff", "edgeattn report diff old.json new.json", configurable=False)
def report_diff(common: Common, old: ReportPath, new: ReportPath) -> Result:
    """Compare two reports: what became more or less accurate, faster or slower."""
    from edgeattn.records import read
    from edgeattn.report import diff, show_diff

    changes = diff(read(old)[0], read(new)[0])
    return Result(show_diff(changes), changes)


@verb(report, "report html", "edgeattn report html shvit_s1-fp32.edgeattn -o report.html", configurable=False)
def report_html(
    common: Common,
    path: ReportPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.html")] = None,
    force: Force = False,
) -> Result:
    """Render a report as one offline page with plots."""
    from edgeattn.records import check_writable, read, write_text
    from edgeattn.report import html

    found, arrays = read(path)
    place = output or (found.path or path).with_suffix(".html")
    check_writable(place.parent, place, force or output is None)
    write_text(place, html(found, arrays))
    return Result(f"page: {place}", {"page": str(place)})
