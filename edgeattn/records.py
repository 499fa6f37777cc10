"""Report documents: one JSON file per run beside its raw samples, numbered, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import (
    AccuracyError,
    BuildError,
    EdgeAttnError,
    IncompatibleError,
    LatencyError,
    MissingError,
    UnsupportedError,
    UsageError,
)

Arrays = Mapping[str, NDArray[Any]]
# If several apply, the first counts: what makes the rest meaningless comes before what was measured.
PRECEDENCE = (8, 5, 4, 3, 6, 7)
_NONFINITE = {"nan", "inf", "-inf"}
_FAILURES: dict[int, tuple[type[EdgeAttnError], str]] = {
    3: (MissingError, "EA0210"),
    4: (UnsupportedError, "EA0410"),
    5: (BuildError, "EA0610"),
    6: (AccuracyError, "EA0701"),
    7: (LatencyError, "EA0801"),
    8: (IncompatibleError, "EA0910"),
}


class Report(dict[str, Any]):
    """A report document: exactly what `--json` prints and what the file in `reports/` holds."""

    path: Path | None = None

    @property
    def verb(self) -> str:
        """Return the command that made it: "validate", "bench", ..."""
        return str(self["schema"]).removeprefix("edgeattn.").partition("/")[0]

    def raise_for_verdict(self) -> None:
        """Raise the error that belongs to the exit code of a run that did not pass; do nothing for one that did."""
        code = self["exit_code"]
        if not code:
            return
        kind, identity = _FAILURES[code]
        raise kind(identity, f"{self['bundle']}: {self['verdict']}: {'; '.join(reasons(self)) or 'nothing passed'}")


def reasons(report: Mapping[str, Any]) -> list[str]:
    """Return one line for everything that did not pass, the failed gates first."""
    failed = [gate for gate in report.get("gates", ()) if not gate["pass"]]
    judged = {gate["backend"] for gate in failed}
    others = [
        f"{backend['name']}: {backend['reason'].removeprefix(backend['name'] + ': ')}"
        for backend in report.get("backends", ())
        if backend["verdict"] in ("fail", "unstable") and backend["name"] not in judged
    ]
    return [gate_line(gate) for gate in failed] + others


def gate_line(gate: Mapping[str, Any]) -> str:
    """Return a gate in words: "ort logits: rel 1.2e-02, limit 5e-06 (floor of fp32)"."""
    value = "not measured" if gate["value"] is None else f"{number(gate['value']):.4g}"
    unit = f" {gate['unit']}" if gate["unit"] else ""
    place = " ".join(part for part in (gate["backend"], gate["output"]) if part)
    return f"{place}: {gate['name']} {value}{unit}, limit {number(gate['limit']):.4g}{unit} ({gate['limit_source']})"


def worst_exit(codes: list[int]) -> int:
    """Return the exit code that counts when several apply, 0 when none does."""
    return next((code for code in PRECEDENCE if code in codes), 0)


def number(value: Any) -> float:
    """Return a number of a report as a float: non-finite ones stand there as strings."""
    return math.nan if value is None else float(value)


def plain(value: Any) -> Any:
    """Return `value` in JSON types: numpy scalars become numbers, numbers that are not finite become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def check_writable(folder: Path, output: Path | None, force: bool) -> None:
    """Refuse an output that cannot be written before anything is measured. Raises EA0105 or EA0202."""
    if output is not None and output.exists() and not force:
        raise UsageError("EA0105", f"{output}: already exists", hints=["--force replaces it, -o names another file"])
    if output is not None and not output.parent.is_dir():
        raise UsageError("EA0105", f"{output.parent}: no such folder", hints=[f"mkdir -p {output.parent}"])
    if output is not None and output.is_dir():
        raise UsageError("EA0105", f"{output}: is a folder; -o names the report file")
    target = folder if output is None else output.parent
    with _environment(target):
        target.mkdir(exist_ok=True)
        probe = target / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()


def save(report: Report, arrays: Arrays, folder: Path, output: Path | None = None) -> Path:
    """Write the report and its arrays (`.npz` beside it) and return the path of the JSON file.

    Without `output` the name is the next free `reports/<verb>-NNNN.json`. The samples are there before the document
    that names them. Raises EA0202 without permission, EA0203 when the disk is full.
    """
    with _environment(folder if output is None else output.parent), _claimed(report.verb, folder, output) as path:
        report.path, samples = path, path.with_suffix(".npz")
        report["samples_file"] = samples.name
        for result in report.get("results", ()):
            result["samples_file"] = samples.name
        if "html" in report and report["html"]["skipped"] is None:
            report["html"] = {"file": path.with_suffix(".html").name, "skipped": None}
        with _replacing(samples) as part, part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        with _replacing(path) as part:
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
            part.write_text(text + "\n", encoding="utf-8")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises EA0202 or EA0203."""
    with _environment(path.parent), _replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read(path: str | Path) -> tuple[Report, dict[str, NDArray[Any]]]:
    """Return a stored report and its arrays; for a bundle, its latest validation. Raises EA0172.

    The arrays are optional: a report copied alone still reads, with no samples.
    """
    file = _latest(Path(path))
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("EA0172", f"{file}: not a readable report", why=str(error)) from error
    if not isinstance(document, dict) or not str(document.get("schema", "")).startswith("edgeattn."):
        raise UsageError("EA0172", f"{file}: not a report of edgeattn (no schema)")
    report = Report(document)
    report.path = file
    return report, _arrays(file, document.get("samples_file"))


def _arrays(file: Path, name: Any) -> dict[str, NDArray[Any]]:
    # A report may name a file beside it and nothing else.
    if not isinstance(name, str) or Path(name).name != name or not (file.parent / name).is_file():
        return {}
    try:
        with np.load(file.parent / name, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:
        raise UsageError("EA0172", f"{file.parent / name}: damaged samples", why=str(error)) from error


def _latest(path: Path) -> Path:
    """Return the newest validation (else benchmark) of a bundle folder, or `path` itself when it is a file."""
    if not path.exists():
        raise UsageError("EA0172", f"{path}: does not exist")
    if path.is_file():
        return path
    for verb in ("validate", "bench"):
        found = sorted((path / "reports").glob(f"{verb}-*.json"), key=lambda item: (len(item.name), item.name))
        if found:
            return found[-1]
    raise UsageError("EA0172", f"{path}: no report in it yet", hints=[f"edgeattn validate {path}"])


@contextlib.contextmanager
def _claimed(verb: str, folder: Path, output: Path | None) -> Iterator[Path]:
    """Yield the path of the report; a numbered one is claimed by creating its samples file, which an error removes."""
    if output is not None:
        yield output
        return
    path = _claim(verb, folder)
    try:
        yield path
    except BaseException:
        path.with_suffix(".npz").unlink(missing_ok=True)
        raise


def _claim(verb: str, folder: Path) -> Path:
    taken = [int(match[1]) for item in folder.iterdir() if (match := re.match(rf"{verb}-(\d+)\.", item.name))]
    count = max(taken, default=0)
    while True:
        count += 1
        path = folder / f"{verb}-{count:04d}.json"
        with contextlib.suppress(FileExistsError), path.with_suffix(".npz").open("xb"):
            return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes the place of `path` when the block ends well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MissingError("EA0203", f"{folder}: disk full while writing the report") from error
        hints = ["-o FILE.json writes the report elsewhere"]
        raise MissingError("EA0202", f"{folder}: cannot write: {error.strerror}", hints=hints) from error
