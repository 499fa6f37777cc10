"""ONNX graph to TensorRT engine; so far a parse and build with TensorRT-RTX, which needs no GPU, in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The largest of our graphs takes under 30 s; a parser that hangs must not hang the export.
TIMEOUT_S = 600
Profile = Mapping[str, Sequence[Sequence[int]]]


def rtx_check(graph: Path, profiles: Profile | None = None) -> dict[str, Any]:
    """Parse and build `graph` with NVIDIA's own parser and builder, in a child process because they may abort.

    `profiles` gives minimal, optimal and maximal shape of each dynamic input. Returns {"verdict": "pass", "layers",
    "engine_bytes", "seconds"}, {"verdict": "fail", "reason"} or {"verdict": "skipped", "reason"}.
    """
    if find_spec("tensorrt_rtx") is None:
        return {"verdict": "skipped", "reason": "tensorrt_rtx is not installed: pip install 'edgeattn[rtx]'"}
    command = [sys.executable, "-m", "edgeattn.engine", str(graph), json.dumps(profiles or {})]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"verdict": "fail", "reason": f"no engine after {TIMEOUT_S} s"}
    lines = child.stdout.strip().splitlines()
    if child.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    last = (child.stderr.strip().splitlines() or [f"the builder ended with status {child.returncode}"])[-1]
    return {"verdict": "fail", "reason": last[:300]}


def _build(graph: Path, profiles: Profile) -> dict[str, Any]:
    import tensorrt_rtx as trt  # type: ignore[import-untyped,unused-ignore]  # optional, and slow to load

    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        reasons = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        return {"verdict": "fail", "reason": f"parser: {reasons[0][:300] if reasons else 'refused'}"}
    config = builder.create_builder_config()
    if profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in profiles.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    # A fixed compute capability makes the build independent of the machine; kernels are compiled at load time on it.
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"verdict": "fail", "reason": "builder: no engine; its messages are above"}
    seconds = round(time.perf_counter() - start, 3)
    return {"verdict": "pass", "layers": network.num_layers, "engine_bytes": engine.nbytes, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(_build(Path(sys.argv[1]), json.loads(sys.argv[2]))))
