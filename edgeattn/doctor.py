"""The environment, checked: one line per thing that a command may need, with the remedy where it is wanting."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*([^;]*)(?:;(.*))?")
_SPECIFIER = re.compile(r"(>=|<|==|<=|>)\s*([0-9.]+)")
_EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")
# What each extra is for; an extra counts as installed when its first package is.
_PURPOSES = {
    "cpu": "export, validate and run",
    "report": "HTML reports",
    "rtx": "the TensorRT-RTX check",
    "tensorrt": "engines",
}
_LEADERS = {"cpu": "torch", "report": "jinja2", "rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_FREE_DISK_GB, _FREE_MEMORY_GB = 2.0, 2.5


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, what was found, and what to do about it."""

    name: str
    status: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the entry of the JSON document."""
        return asdict(self)


def examine(target: str | None = None) -> list[Check]:
    """Check Python, packages, GPU, memory and disk; `target` adds what compiling for that board needs.

    A package that an installed extra or the target needs and lacks fails; everything optional only warns.
    """
    checks = [_python(), *_packages(), _gpu(), _compiler(), _memory(), *_disks()]
    return [*checks, *_target(target)] if target else checks


def as_text(checks: Sequence[Check]) -> str:
    """Return one line per check."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5} {check.name:<18} {check.found}".rstrip())
        if check.remedy:
            lines.append(f"{'':<24} try: {check.remedy}")
    counts = [f"{sum(check.status == status for check in checks)} {status}" for status in (OK, WARN, FAIL)]
    return "\n".join([*lines, ", ".join(counts)])


def _python() -> Check:
    good = sys.version_info >= (3, 10)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", OK if good else FAIL, found, "" if good else "use Python 3.10 or newer")


def _packages() -> Iterator[Check]:
    """Compare what is installed with what our own metadata asks for."""
    wanted = _requirements()
    for extra in ("", *_LEADERS):
        installed = not extra or _version(_LEADERS[extra]) is not None
        if not installed:
            found = f"not installed ({_PURPOSES[extra]} not available)"
            yield Check(f"extra {extra}", WARN, found, f"pip install 'edgeattn[{extra}]'")
            continue
        for name, specifiers in wanted.get(extra, ()):
            yield _package(name, specifiers, extra)


def _package(name: str, specifiers: str, extra: str) -> Check:
    version = _version(name)
    install = f"pip install 'edgeattn[{extra}]'" if extra else "pip install edgeattn"
    if version is None and name == "onnxruntime":
        version = _version("onnxruntime-gpu")  # the same package, built for CUDA
    if version is None:
        return Check(name, FAIL, f"not installed (edgeattn[{extra}] needs {name}{specifiers})", install)
    if not _satisfies(version, specifiers):
        return Check(name, FAIL, f"{version}, needs {specifiers}", f"pip install '{name}{specifiers}'")
    return Check(name, OK, version)


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """Return extra ("" for the base) to pairs of package and version range, for this machine."""
    found: dict[str, list[tuple[str, str]]] = {}
    for text in importlib.metadata.requires("edgeattn") or ():
        match = _REQUIREMENT.fullmatch(text.strip())
        if match is None:
            continue
        marker = match[3] or ""
        extra = _EXTRA.search(marker)
        if _applies(marker):
            found.setdefault(extra[1] if extra else "", []).append((match[1], match[2].strip()))
    return found


def _applies(marker: str) -> bool:
    """Tell whether a requirement is meant for this system and machine."""
    here = {"platform_system": platform.system(), "platform_machine": platform.machine()}
    wanted = re.findall(r"(platform_\w+) == ['\"](\w+)['\"]", marker)
    return all(here.get(name) == value for name, value in wanted)


def _satisfies(version: str, specifiers: str) -> bool:
    return all(_compare(_numbers(version), sign, _numbers(bound)) for sign, bound in _SPECIFIER.findall(specifiers))


def _compare(found: tuple[int, ...], sign: str, bound: tuple[int, ...]) -> bool:
    return {">=": found >= bound, "<": found < bound, "==": found == bound, "<=": found <= bound, ">": found > bound}[
        sign
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, padded: "2.13.0+cpu" is (2, 13, 0)."""
    digits = re.match(r"[0-9.]*", version)
    parts = [int(part) for part in (digits[0] if digits else "").split(".") if part]
    return tuple([*parts, 0, 0, 0][:3])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Check:
    """Ask the driver: importing torch for this would take seconds and prove less."""
    if Path("/proc/device-tree/model").is_file():
        board = Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n")
        return Check("gpu", OK, board)
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout if tool else ""
    except (OSError, subprocess.SubprocessError):
        found = ""
    if not found.strip():
        return Check("gpu", WARN, "none: export and validate with ONNX Runtime work without one")
    return Check("gpu", OK, "; ".join(line.strip() for line in found.strip().splitlines()))


def _compiler() -> Check:
    """Look for a C compiler: torch.compile and the plugin library need one, nothing else."""
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found:
        return Check("c compiler", OK, found)
    return Check("c compiler", WARN, "none: validate --compile is not available", "install gcc or clang")


def _memory() -> Check:
    free = _free_memory_gb()
    if free is None:
        return Check("memory", WARN, "unknown on this system")
    enough = free >= _FREE_MEMORY_GB
    remedy = "" if enough else f"an export may need {_FREE_MEMORY_GB} GB"
    return Check("memory", OK if enough else WARN, f"{free:.1f} GB free", remedy)


def _free_memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.split()[1:]}
    return values["MemAvailable"] * 1024 / 1e9 if "MemAvailable" in values else None


def _disks() -> Iterator[Check]:
    from edgeattn.download import cache_folder

    for name, folder in (("working folder", Path.cwd()), ("cache", cache_folder())):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            yield Check(name, WARN, f"{folder}: not writable", "-o and EDGEATTN_CACHE name other folders")
        elif free < _FREE_DISK_GB:
            yield Check(name, WARN, f"{folder}: {free:.1f} GB free", "free some space")
        else:
            yield Check(name, OK, f"{folder}: {free:.0f} GB free")


def _target(name: str) -> Iterator[Check]:
    """Check what compiling for a board needs here; running on it is another machine's matter."""
    from edgeattn.target import get_target

    target = get_target(name)
    yield Check(f"target {name}", OK, _describe(target))
    needed = ("torch", "onnx", "onnxscript", "onnxruntime", *(("triton",) if target.sm else ()))
    for package in needed:
        if _version(package) is None and not (package == "onnxruntime" and _version("onnxruntime-gpu")):
            yield Check(package, FAIL, f"not installed, exporting for {name} needs it", "pip install 'edgeattn[cpu]'")


def _describe(target: Any) -> str:
    if not target.sm:
        return str(target.device)
    versions = " to ".join(target.tensorrt)
    return f"{target.device}: sm_{target.sm}, TensorRT {versions}, CUDA {target.cuda}, {target.memory_gib:g} GiB"
