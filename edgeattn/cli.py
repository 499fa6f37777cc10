"""The command line: one short function per verb, which parses, calls the API and returns what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.console import Result
from edgeattn.options import Common, group, verb

_SUMMARY = "Compile lightweight attention models from PyTorch to the edge, and validate them."
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
models = typer.Typer(rich_markup_mode=None)
ops = typer.Typer(rich_markup_mode=None)
report = typer.Typer(rich_markup_mode=None)
group(app, _SUMMARY)
for _name, _app, _help in (
    ("models", models, "The catalogue of models."),
    ("ops", ops, "The registered operators."),
    ("report", report, "Stored reports: read, compare, render."),
):
    group(_app, _help, hidden=True)
    app.add_typer(_app, name=_name, help=_help)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", help="ort or torch; repeatable.")]
ReportPath = Annotated[Path, typer.Argument(metavar="REPORT", help="A report file, or a bundle for its latest.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
Data = Annotated[str | None, typer.Option(metavar="DIR|FILE|seed:N", help="Images, an .npz, or seeded inputs.")]
Maxima = Annotated[list[str] | None, typer.Option("--max", metavar="METRIC=VALUE", help="A limit: p50=4ms ...")]
Versus = Annotated[Path | None, typer.Option("--vs", metavar="REPORT", help="Compare with a stored report.")]
Regress = Annotated[str | None, typer.Option(metavar="PERCENT", help="Loss allowed against --vs (3%).")]
Stable = Annotated[bool | None, typer.Option("--require-stable/--no-require-stable", help="Fail when unstable.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Measure torch.compile too.")]
Duration = Annotated[str, typer.Option(metavar="TIME", help="Measured time per backend.")]
Html = Annotated[bool | None, typer.Option("--html/--no-html", help="Write a page with plots.")]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write one test case per gate.")]
ReportFile = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="The report file.")]


@verb(app, "export", "edgeattn export shvit_s1 --target orin")
def export(
    common: Common,
    model: Annotated[str, typer.Argument(help="A catalogue name, package.module:factory or a .pt2 file.")],
    output: Output = None,
    weights: Annotated[str | None, typer.Option(metavar="FILE|official", help="Default: seeded weights.")] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=1x3x224x224")] = None,
    dim: Annotated[list[str] | None, typer.Option("--dim", metavar="NAME=MIN:MAX:OPT", help="A dynamic size.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", help="portable, orin, thor, rtx ...")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or fp16 (fp16 once a board is named).")] = None,
    precision_plan: Annotated[Path | None, typer.Option(metavar="FILE", help="An edited precision.json.")] = None,
    keep_fp32: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Modules that stay fp32.")] = None,
    until: Annotated[str, typer.Option(help="trace, translate, passes, precision, lower or kernels.")] = "kernels",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the result with PyTorch.")] = True,
    dump_passes: Annotated[Path | None, typer.Option(metavar="DIR", help="Graphs around every pass.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take the weights that fit.")] = False,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, kept in the bundle.")] = None,
    force: Force = False,
) -> Result:
    """Compile MODEL into a bundle: trace, rewrite, lower, check. No GPU is needed."""
    from edgeattn import outcome
    from edgeattn.pipeline import export_model

    progress = common.tracker()
    made = export_model(
        model,
        output=output,
        weights=weights,
        inputs=input_ or (),
        dims=dim or (),
        targets=target or ("portable",),
        precision=precision,
        precision_plan=precision_plan,
        keep_fp32=keep_fp32 or (),
        until=until,
        check=check,
        dump_passes=dump_passes,
        allow_partial=allow_partial,
        force=force,
        dry_run=common.dry_run,
        labels=labels,
        progress=progress,
    )
    return outcome.exported(made, progress.stages)


@verb(app, "validate", "edgeattn validate shvit_s1-fp32.edgeattn --data photos")
def validate(
    common: Common,
    bundle: BundlePath,
    backend: Backends = None,
    data: Data = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most this many samples.")] = None,
    level: Annotated[str | None, typer.Option(help="outputs, modules or nodes.")] = None,
    gate: Annotated[list[str] | None, typer.Option("--gate", metavar="NAME=VALUE", help="Replace a band.")] = None,
    latency: Annotated[bool | None, typer.Option("--latency/--no-latency", help="Measure latency too.")] = None,
    maximum: Maxima = None,
    versus: Versus = None,
    regress: Regress = None,
    require_stable: Stable = None,
    compiled: Compiled = False,
    threads: Threads = None,
    duration: Duration = "3s",
    html: Html = None,
    junit: Junit = None,
    output: ReportFile = None,
    force: Force = False,
) -> Result:
    """Compare BUNDLE with its PyTorch original: accuracy and latency, pass or fail."""
    from edgeattn.report import show
    from edgeattn.validate import validate as compare

    if common.dry_run:
        return _planned("validate", bundle, backend, data)
    found = compare(
        bundle,
        backends=backend or (),
        data=data,
        samples=samples,
        level=level,
        gates=gate or (),
        latency=latency,
        maximum=maximum or (),
        versus=versus,
        regress=regress,
        require_stable=require_stable,
        compile=compiled,
        threads=threads,
        duration=duration,
        html=html,
        junit=junit,
        output=output,
        force=force,
        progress=common.tracker(),
    )
    return Result(show(found), found, found["exit_code"])


@verb(app, "bench", "edgeattn bench shvit_s1-fp32.edgeattn --duration 10s --max p50=5ms")
def bench(
    common: Common,
    bundle: BundlePath,
    backend: Backends = None,
    data: Data = None,
    maximum: Maxima = None,
    versus: Versus = None,
    regress: Regress = None,
    require_stable: Stable = None,
    compiled: Compiled = False,
    threads: Threads = None,
    duration: Duration = "3s",
    html: Html = None,
    junit: Junit = None,
    output: ReportFile = None,
    force: Force = False,
) -> Result:
    """Measure the latency of BUNDLE on every backend, in alternating rounds."""
    from edgeattn.report import show
    from edgeattn.validate import bench as measure

    if common.dry_run:
        return _planned("bench", bundle, backend, data)
    found = measure(
        bundle,
        backends=backend or (),
        data=data,
        maximum=maximum or (),
        versus=versus,
        regress=regress,
        require_stable=require_stable,
        compile=compiled,
        threads=threads,
        duration=duration,
        html=html,
        junit=junit,
        output=output,
        force=force,
        progress=common.tracker(),
    )
    return Result(show(found), found, found["exit_code"])


def _planned(what: str, path: Path, backends: list[str] | None, data: str | None) -> Result:
    """Check bundle and backends, and say what would be measured."""
    from edgeattn.backends import choose, usable
    from edgeattn.bundle import Bundle

    opened = Bundle.open(path)
    opened.verify()
    names = [choose(name) for name in backends or usable()]
    document = {"dry_run": True, "bundle": str(path), "backends": names, "data": data}
    return Result(f"dry run: would {what} {path} on {', '.join(names)} with {data or 'its own inputs'}", document)


@verb(app, "run", "edgeattn run shvit_s1-fp32.edgeattn cat.jpg --labels names.txt")
def run(
    common: Common,
    bundle: BundlePath,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, or one .npz of inputs.")],
    backend: Annotated[str | None, typer.Option(help="ort or torch.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 5,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one per line.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.npz", help="Save outputs.")] = None,
    threads: Threads = None,
    force: Force = False,
) -> Result:
    """Run images or arrays through BUNDLE and print the best classes."""
    from edgeattn.inference import run_inputs

    return run_inputs(
        bundle,
        inputs,
        backend=backend,
        top=top,
        labels=labels,
        output=output,
        threads=threads,
        force=force,
        dry_run=common.dry_run,
        progress=common.tracker(),
    )


@verb(app, "inspect", "edgeattn inspect shvit_s1-fp32.edgeattn --modules")
def inspect(
    common: Common,
    path: Annotated[Path, typer.Argument(help="A bundle or an .onnx file.")],
    modules: Annotated[bool, typer.Option("--modules", help="Count nodes by PyTorch module.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every node.")] = False,
) -> Result:
    """Show what is inside a bundle or an ONNX file."""
    from edgeattn.inspection import as_text
    from edgeattn.inspection import inspect as look

    document = look(path, modules=modules, layers=layers)
    return Result(as_text(document), document)


@verb(app, "doctor", "edgeattn doctor --target orin")
def doctor(
    common: Common,
    target: Annotated[str | None, typer.Option(help="Check what compiling for this board needs.")] = None,
) -> Result:
    """Check the environment: versions, GPU, memory, disk; exit 3 when something needed is missing."""
    from edgeattn.doctor import FAIL, as_text, examine

    checks = examine(target)
    failed = any(check.status == FAIL for check in checks)
    return Result(as_text(checks), {"checks": [check.as_dict() for check in checks]}, 3 if failed else 0)


@verb(models, "models list", "edgeattn models list", configurable=False)
def models_list(common: Common) -> Result:
    """List all models with their sizes and published accuracy."""
    from edgeattn import catalogue

    text, entries = catalogue.models()
    return Result(text, {"models": entries})


@verb(models, "models show", "edgeattn models show shvit_s1", configurable=False)
def models_show(common: Common, name: Annotated[str, typer.Argument(metavar="MODEL")]) -> Result:
    """Show one model: input, size, paper, weights."""
    from edgeattn import catalogue

    return Result(*catalogue.model(name))


@verb(models, "models check", "edgeattn models check shvit_s1 shvit_s1.pth", configurable=False)
def models_check(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="MODEL")],
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
def ops_show(common: Common, name: Annotated[str, typer.Argument(metavar="OP")]) -> Result:
    """Show one operator: meaning, cases and ONNX body."""
    from edgeattn import catalogue

    return Result(*catalogue.op(name))


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
