"""Reports for people and for other tools: a table, a comparison of two runs, a page, JUnit, and where they go."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn import records
from edgeattn.errors import MissingError, UsageError
from edgeattn.packages import require
from edgeattn.records import Arrays, Report, number

_GAP = "   "
_LINES_ON_FAILURE = 10


@dataclass(frozen=True)
class Destination:
    """Where a run leaves its report; `html` None writes the page if its packages are installed, True demands them."""

    folder: Path
    output: str | Path | None = None
    html: bool | None = None
    junit: str | Path | None = None
    force: bool = False

    def check(self) -> None:
        """Refuse what cannot be written before anything is measured. Raises EA0105, EA0201 or EA0202."""
        records.check_writable(self.folder, None if self.output is None else Path(self.output), self.force)
        if self.junit is not None:
            records.check_writable(Path(self.junit).parent, Path(self.junit), True)
        if self.html:
            _require_packages()

    def write(self, report: Report, arrays: Arrays) -> Report:
        """Write document, samples, page and JUnit file; the report then knows its path."""
        skipped = "not asked for" if self.html is False else html_obstacle()
        report["html"] = {"file": None, "skipped": skipped}
        path = records.save(report, arrays, self.folder, None if self.output is None else Path(self.output))
        if not skipped:
            records.write_text(path.with_suffix(".html"), html(report, arrays))
        if self.junit is not None:
            junit(report, Path(self.junit))
        return report


def show(report: Mapping[str, Any]) -> str:
    """Return a report as the table that the command prints; the last line is the verdict."""
    verb = str(report.get("schema", "")).removeprefix("edgeattn.").partition("/")[0]
    if verb not in _TABLES:
        return _outline(report)
    rows = _TABLES[verb](report)
    lines = [table(rows)] if len(rows) > 1 else []
    stages = stage_rows(report)
    lines += [table(stages)] if stages else []
    lines += [f"boxes: {text}" for text in detection_lines(report)]
    lines += [f"skipped: {entry['backend']}: {entry['reason']}" for entry in report["skipped"]]
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += [blame_line(report)] if report["blame"] else []
    lines += records.reasons(report)[:_LINES_ON_FAILURE]
    path = getattr(report, "path", None)
    place = f"report: {path}{_GAP}" if path else ""
    return "\n".join([*lines, _state(report), f"{place}verdict: {_verdict(report)}"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, the first row as the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(row.rstrip() for row in padded)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changed from one report to another, per backend and output."""
    outputs, latencies = [], []
    for name, before, after in _pairs(old.get("backends", ()), new.get("backends", ()), "name"):
        for output, was, now in _pairs(before["outputs"], after["outputs"], "name"):
            change = {"old": was["scaled_err"], "new": now["scaled_err"]}
            outputs.append({"backend": name, "output": output, "scaled_err": change, "factor": _factor(change)})
    for name, before, after in _pairs(old.get("results", ()), new.get("results", ()), "backend"):
        change = {"old": before["p50_ms"], "new": after["p50_ms"]}
        latencies.append({"backend": name, "p50_ms": change, "factor": _factor(change)})
    same = {key: old.get(key) == new.get(key) for key in ("bundle_sha256", "model", "precision", "edgeattn")}
    same["host"] = old.get("host") == new.get("host")
    names = [sorted(entry["name"] for entry in side.get("backends", ())) for side in (old, new)]
    return {
        "verdicts": {"old": old["verdict"], "new": new["verdict"]},
        "same": same,
        "only_old": sorted(set(names[0]) - set(names[1])),
        "only_new": sorted(set(names[1]) - set(names[0])),
        "outputs": outputs,
        "latencies": latencies,
    }


def show_diff(changes: Mapping[str, Any]) -> str:
    """Return a comparison of two reports as tables."""
    rows = [["backend", "output", "scaled err", "", "change"]]
    for entry in changes["outputs"]:
        error = entry["scaled_err"]
        rows.append(
            [entry["backend"], entry["output"], _error(error["old"]), _error(error["new"]), _times(entry["factor"])]
        )
    lines = [table(rows)] if len(rows) > 1 else []
    rows = [["backend", "p50 e2e", "", "change"]]
    for entry in changes["latencies"]:
        time = entry["p50_ms"]
        percent = "-" if entry["factor"] is None else f"{100 * (entry['factor'] - 1):+.1f} %"
        rows.append([entry["backend"], milliseconds(time["old"]), milliseconds(time["new"]), percent])
    lines += [table(rows)] if len(rows) > 1 else []
    lines += [f"only in the old report: {name}" for name in changes["only_old"]]
    lines += [f"only in the new report: {name}" for name in changes["only_new"]]
    other = [name for name, same in changes["same"].items() if not same]
    lines += [f"differs: {', '.join(other)}"] if other else []
    return "\n".join([*lines, f"verdict: {changes['verdicts']['old']} -> {changes['verdicts']['new']}"])


def junit(report: Mapping[str, Any], path: Path) -> None:
    """Write one JUnit test case per gate, and one per backend that failed or was skipped without any."""
    suite = xml.Element("testsuite", name=f"edgeattn {report['bundle']}", timestamp=report["started"].rstrip("Z"))
    for gate in report["gates"]:
        name = " ".join(part for part in (gate["output"], gate["name"]) if part)
        case = xml.SubElement(suite, "testcase", classname=f"{report['bundle']}.{gate['backend']}", name=name)
        if not gate["pass"]:
            xml.SubElement(case, "failure", message=records.gate_line(gate))
    judged = {gate["backend"] for gate in report["gates"] if not gate["pass"]}
    for backend in report["backends"]:
        if backend["verdict"] in ("fail", "skipped", "unstable") and backend["name"] not in judged:
            case = xml.SubElement(suite, "testcase", classname=f"{report['bundle']}.{backend['name']}", name="verdict")
            kind = "skipped" if backend["verdict"] == "skipped" else "failure"
            xml.SubElement(case, kind, message=backend["reason"])
    for kind, attribute in (("testcase", "tests"), ("failure", "failures"), ("skipped", "skipped")):
        suite.set(attribute, str(len(list(suite.iter(kind)))))
    xml.indent(suite)
    records.write_text(path, xml.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


def html_obstacle() -> str | None:
    """Return why the page cannot be written here, or None."""
    try:
        _require_packages()
    except MissingError as error:
        return f"{error.message}: {error.hints[0]}"
    return None


def html(report: Mapping[str, Any], arrays: Arrays) -> str:
    """Return one self-contained page for a report of validate or bench. Raises EA0201 or EA0174."""
    _require_packages()
    if str(report["schema"]).partition("/")[0] not in ("edgeattn.validate", "edgeattn.bench"):
        raise UsageError("EA0174", f"{report['schema']}: only reports of validate and bench have a page")
    from edgeattn.page import render

    return render(report, arrays)


def _require_packages() -> None:
    for name in ("jinja2", "matplotlib"):
        require(name)


def milliseconds(value: Any) -> str:
    """Return a time for a table cell: three digits at least, "-" for what was not measured."""
    if value is None:
        return "-"
    time = number(value)
    digits = 3 if time < 0.1 else 2 if time < 100 else 0
    return f"{time:.{digits}f} ms"


def _validate_rows(report: Mapping[str, Any]) -> list[list[str]]:
    results = {result["backend"]: result for result in report["results"]}
    tail = "p99" if any(result["p99_ms"] is not None for result in results.values()) else "p95"
    scope = next((result["scope"] for result in report["results"]), "e2e")
    timing = [f"p50 {scope}", f"{tail} {scope}", "vs torch"] if results else []
    agreement = "boxes" if any("detections" in backend for backend in report["backends"]) else "top-1"
    rows = [["backend", "outputs", "scaled err (band)", "cosine", agreement, "NaN", *timing, "verdict"]]
    compared = {backend["name"]: backend for backend in report["backends"]}
    tested = [name for name, backend in compared.items() if backend["verdict"] != "reference"]
    for name in sorted(dict.fromkeys([*compared, *results]), key=tested.__contains__):
        timed = results.get(name)
        cells = _accuracy_cells(compared.get(name))
        if results:
            cells += [
                milliseconds(timed and timed["p50_ms"]),
                milliseconds(timed and timed[f"{tail}_ms"]),
                ratio(timed),
            ]
        verdict = compared[name]["verdict"] if name in compared else "reference"
        rows.append([name, *cells, "-" if verdict == "reference" else verdict.upper()])
    return rows


def _accuracy_cells(backend: Mapping[str, Any] | None) -> list[str]:
    """Return outputs, error with band, cosine, top-1 (or boxes) and NaN of the output worst against its band."""
    outputs = backend["outputs"] if backend else []
    if not outputs:
        reference = backend is None or backend["verdict"] == "reference"
        return ["-", "(reference)" if reference else "-", "-", "-", "-"]
    worst = max(
        outputs, key=lambda output: number(output["scaled_err"]) / (output.get("band", {}).get("limit") or 1e-30)
    )
    band = f"{worst['band']['limit']:.1e}" if "band" in worst else "ref"
    classified = [output for output in outputs if output["top1"] is not None]
    least = min(classified, key=lambda output: number(output["top1"]), default=None)
    agreed = "-" if least is None else f"{round(least['top1'] * least['rows'])}/{least['rows']}"
    if backend and "detections" in backend:
        boxes = backend["detections"]["boxes"]
        agreed = f"{boxes['matched']}/{max(boxes['expected'], boxes['found'])}"
    strange = sum(output["nan"] + output["inf"] for output in outputs)
    error = f"{_error(worst['scaled_err'])} ({band})"
    return [str(len(outputs)), error, f"{number(worst['cosine']):.6f}", agreed, str(strange)]


def stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a detector's stages as a table: the worst error of each stage and its time, per backend."""
    compared = [backend for backend in report["backends"] if any("band" in entry for entry in backend["modules"])]
    timed = [result for result in report["results"] if "stages" in result]
    errors = {backend["name"]: _stage_errors(backend["modules"]) for backend in compared}
    times = {result["backend"]: {part["name"]: part["p50_ms"] for part in result["stages"]} for result in timed}
    names = list(dict.fromkeys(name for cells in (*errors.values(), *times.values()) for name in cells))
    if not names:
        return []
    # Decoding is timed and not compared, so times know all stages in order.
    names = list(next(iter(times.values()), names))
    rows = [["stage", *(f"{name} scaled err (band)" for name in errors), *(f"{name} p50" for name in times)]]
    for name in names:
        cells = [found.get(name, "-") for found in errors.values()]
        rows.append([name, *cells, *(milliseconds(found.get(name)) for found in times.values())])
    if times:
        rows.append(["whole", *("-" for _ in errors), *(milliseconds(result["p50_ms"]) for result in timed)])
    return rows


def detection_lines(report: Mapping[str, Any]) -> list[str]:
    """Return one sentence per tested backend about the boxes of a detector."""
    lines = []
    for backend in report["backends"]:
        found = backend.get("detections")
        if found is not None and backend["role"] == "candidate":
            boxes, close = found["boxes"], _error(found["score_difference"])
            counts = f"{backend['name']} finds {boxes['found']}, PyTorch {boxes['expected']}"
            matched = f"{boxes['matched']} match at IoU {found['iou']} ({_percent(found['matched'])})"
            lines.append(f"{counts}; {matched}, scores within {close}; candidates {_percent(found['candidates'])}")
    return lines


def blame_line(report: Mapping[str, Any]) -> str:
    """Return at which stage a detector first differs from PyTorch."""
    blame = report["blame"]
    return f"{blame['backend']}: the first stage that differs is {blame['module']} ({blame['value']})"


def _stage_errors(modules: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the error, with its band, of the value of each stage that is worst against it."""
    worst: dict[str, Mapping[str, Any]] = {}
    for entry in modules:
        worst[entry["stage"]] = max(worst.get(entry["stage"], entry), entry, key=_against_band)
    return {name: _stage_cell(entry) for name, entry in worst.items()}


def _stage_cell(entry: Mapping[str, Any]) -> str:
    if entry["integer"]:
        return f"{_error(entry['scaled_err'])} (exact)" if number(entry["scaled_err"]) else "exact"
    return f"{_error(entry['scaled_err'])} ({number(entry['band']['limit']):.1e})"


def _against_band(entry: Mapping[str, Any]) -> float:
    return number(entry["scaled_err"]) / (number(entry["band"]["limit"]) or 1e-30)


def _bench_rows(report: Mapping[str, Any]) -> list[list[str]]:
    percentiles = ("p50", "p90", "p95", "p99", "max")
    rows = [["backend", "scope", *percentiles, "jitter", "cv", "n", "vs torch (95 %)", "stable"]]
    for result in report["results"]:
        times = [milliseconds(result[f"{key}_ms"]) for key in (*percentiles, "jitter")]
        sure = "yes" if result["stable"] else "no"
        cv = f"{100 * number(result['cv']):.1f} %"
        rows.append(
            [result["backend"], result["scope"], *times, cv, str(result["n"]), ratio(result, interval=True), sure]
        )
    return rows


def ratio(result: Mapping[str, Any] | None, *, interval: bool = False) -> str:
    """Return "4.3x", or "4.3x (4.1-4.5)" with the interval."""
    found = result and result["ratio"]
    if not found:
        return "-"
    text = f"{number(found['value']):.1f}x" if number(found["value"]) < 10 else f"{number(found['value']):.0f}x"
    known = interval and found["low"] is not None and found["to"] != result["backend"]  # type: ignore[index]
    return f"{text} ({number(found['low']):.2f}-{number(found['high']):.2f})" if known else text


def _state(report: Mapping[str, Any]) -> str:
    state, host = report["state"], report["host"]
    parts = [host["device"], f"{state['threads']} of {host['cores']} threads"]
    if state["before"]["cpu_mhz"]:
        parts.append(f"{state['before']['cpu_mhz']} MHz")
    if state["after"]["temp_c"]:
        parts.append(f"{state['after']['temp_c']:.0f} C")
    if state["background_cores"] is not None and report["results"]:
        parts.append(f"{state['background_cores']:.1f} cores busy elsewhere")
    tested = [number(result["cv"]) for result in report["results"]]
    parts += [f"cv {100 * max(tested):.1f} %"] if tested else []
    return f"state: {', '.join(parts)}"


def _verdict(report: Mapping[str, Any]) -> str:
    judged = ["accuracy"] if report["data"]["samples"] else []
    judged += ["latency"] if report["results"] else []
    scope = f" ({', '.join(judged)})" if judged else ""
    return f"{report['verdict'].upper()}{scope}"


def _outline(report: Mapping[str, Any]) -> str:
    """Return a document of another verb as one line per entry."""
    lines = []
    for key, value in report.items():
        if isinstance(value, (str, int, float, bool)) or value is None:
            lines.append([str(key), str(value)])
        else:
            lines.append([str(key), f"{len(value)} entries"])
    return table(lines)


def _pairs(old: Sequence[Any], new: Sequence[Any], key: str) -> list[tuple[str, Any, Any]]:
    """Return the entries that both have, matched by name, in the order of the new ones."""
    before = {entry[key]: entry for entry in old}
    return [(entry[key], before[entry[key]], entry) for entry in new if entry[key] in before]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _factor(change: Mapping[str, Any]) -> float | None:
    old, new = number(change["old"]), number(change["new"])
    return new / old if old else None


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}x"


def _error(value: Any) -> str:
    return f"{number(value):.1e}" if number(value) else "0"


_TABLES = {"validate": _validate_rows, "bench": _bench_rows}
