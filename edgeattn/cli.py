"""The command line: one short function per verb, which parses, calls the API and returns what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn import groups
from edgeattn.console import Result
from edgeattn.options import Common, group, verb

_SUMMARY = "Compile lightweight attention models from PyTorch to the edge, and validate them."
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
group(app, _SUMMARY)
for _name, _app in groups.APPS.items():
    app.add_typer(_app, name=_name)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", help="ort or torch; repeatable.")]
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
    max_points: Annotated[int | None, typer.Option(min=1, metavar="N", help="Points of a cloud that fit.")] = None,
    max_voxels: Annotated[list[int] | None, typer.Option(min=1, metavar="N", help="Voxels; or once per stage.")] = None,
    max_sets: Annotated[list[int] | None, typer.Option(min=1, metavar="N", help="Sets; or once per shift.")] = None,
    profile_from: Annotated[Path | None, typer.Option(metavar="DIR", help="Take capacities from clouds.")] = None,
    split: Annotated[str | None, typer.Option(metavar="blocks", help="Only the blocks of a detector.")] = None,
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
        max_points=max_points,
        max_voxels=max_voxels or (),
        max_sets=max_sets or (),
        profile_from=profile_from,
        split=split,
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
    strict_capacity: Annotated[bool, typer.Option("--strict-capacity", help="Refuse clouds that do not fit.")] = False,
    force: Force = False,
) -> Result:
    """Run images, point clouds or arrays through BUNDLE and print the best classes or boxes."""
    from edgeattn.inference import run_inputs

    return run_inputs(
        bundle,
        inputs,
        backend=backend,
        top=top,
        labels=labels,
        output=output,
        threads=threads,
        strict_capacity=strict_capacity,
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
