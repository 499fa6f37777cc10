"""The conditions of a measurement: which machine, how busy, how warm, how many threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("edgeattn", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "numpy")
_MIB = 2**20
_SHORTEST = 0.2
# In cores, and as a share of all cores.
_BUSY, _FULL = 0.25, 0.75


def host() -> dict[str, Any]:
    """Return what identifies this machine and its software, without a name or a path that identifies its owner."""
    return {
        "device": _cpu_name(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def state() -> dict[str, Any]:
    """Return the state of the machine now; an entry that this system does not offer is None."""
    return {
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": _megahertz(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "temp_c": _temperature(),
        "throttle_count": _integer("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"),
        "busy_s": _busy_seconds(),
        "own_s": time.process_time(),
        "clock_s": time.perf_counter(),
    }


def affinity() -> list[int]:
    """Return the cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def background(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Return how many of our cores other processes kept busy, on average, between two states.

    None where the system does not tell, or when the states lie so close that its clock ticks (10 ms) decide.
    """
    elapsed = float(after["clock_s"] - before["clock_s"])
    if before["busy_s"] is None or after["busy_s"] is None or elapsed < _SHORTEST:
        return None
    others = float(after["busy_s"] - before["busy_s"]) - float(after["own_s"] - before["own_s"])
    return min(float(len(affinity())), max(0.0, round(others / elapsed, 2)))


def contended(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether other processes were busy while few cores were left: what was measured is then too slow.

    Time stolen from a virtual machine counts as theirs.
    """
    busy = background(before, after)
    if busy is None or busy < _BUSY:
        return False
    own = (after["own_s"] - before["own_s"]) / (after["clock_s"] - before["clock_s"])
    return bool(busy + own > _FULL * len(affinity()))


def throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    """Return whether the processor throttled between two states, or None when it does not count that."""
    if before["throttle_count"] is None or after["throttle_count"] is None:
        return None
    return bool(after["throttle_count"] > before["throttle_count"])


def resident_mib() -> float | None:
    """Return the resident memory of this process in MiB."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Forget the memory peak so far, so that `peak_mib` tells the peak from here on; False where not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float | None:
    """Return the highest resident memory since `reset_peak`, in MiB."""
    return _status("VmHWM")


def _status(key: str) -> float | None:
    for line in _text("/proc/self/status").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / _MIB
    return None


def _busy_seconds() -> float | None:
    """Return the seconds our cores have worked since the machine started (user, nice, system, interrupts, stolen)."""
    ours = {f"cpu{core}" for core in affinity()}
    rows = [line.split() for line in _text("/proc/stat").splitlines()]
    ticks = [sum(int(row[column]) for column in (1, 2, 3, 6, 7, 8)) for row in rows if row and row[0] in ours]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _cpu_name() -> str:
    lines = _text("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    board = _text("/proc/device-tree/model").strip("\0")
    return board or (names[0] if names else platform.processor() or platform.machine())


def _megahertz() -> int | None:
    lines = _text("/proc/cpuinfo").splitlines()
    speeds = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(speeds) / len(speeds)) if speeds else None


def _temperature() -> float | None:
    zones = [_integer(str(path)) for path in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))]
    degrees = [zone / 1000 for zone in zones if zone is not None and zone > 0]
    return max(degrees) if degrees else None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _integer(path: str) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
