"""The table of targets: one row per board, and `portable` for every ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

from edgeattn.errors import UsageError
from edgeattn.registry import near


@dataclass(frozen=True)
class Target:
    """What the compiler must know about a board.

    `sm` is the device's compute capability times ten, `kernel_sm` the one its kernels are compiled for, `ptx` the PTX
    ISA they are written in (times ten; the driver takes it or newer), `tensorrt` the lowest and highest TensorRT
    release, `memory_gib` and `bandwidth` (GB/s) those of the smallest module, `channel_align` the multiple to which
    the deploy form pads split channels.
    """

    name: str
    device: str
    sm: int = 0
    kernel_sm: int = 0
    tensorrt: tuple[str, str] = ("", "")
    cuda: str = ""
    ptx: int = 0
    memory_gib: float = 0.0
    bandwidth: float = 0.0
    precision: str = "fp16"
    plugins: str = "none"
    channel_align: int = 1


_ROWS = (
    # Blocked convolutions of ONNX Runtime work in groups of 16 channels: unaligned concats cost a reorder (1.2x).
    Target("portable", "any ONNX Runtime", precision="fp32", channel_align=16),
    Target("orin", "Jetson Orin, JetPack 6", 87, 87, ("10.3", "10.7"), "12.6", 85, 8, 204.8, plugins="cpp"),
    # tl.dot lowers to tensor memory on sm_110, which a plugin cannot allocate: its kernels are built for sm_87.
    Target("thor", "Jetson Thor, JetPack 7", 110, 87, ("10.13", "11.4"), "13.0", 85, 64, 273.0, plugins="aot"),
    # The drivers from here on take PTX 9.0; the assembler in Triton 3.6 ends at 8.7.
    Target("rtx", "GeForce RTX with TensorRT-RTX", 89, 89, ("11.1", "11.1"), "13.0", 85, 8, 272.0),
    Target("sm_80", "A100", 80, 80, ("10.3", "11.4"), "13.0", 85, 40, 1555.0, plugins="aot"),
    Target("sm_86", "RTX 30 series", 86, 86, ("10.3", "11.4"), "13.0", 85, 8, 448.0, plugins="aot"),
    Target("sm_89", "RTX 40 series, L4", 89, 89, ("10.3", "11.4"), "13.0", 85, 8, 300.0, plugins="aot"),
    Target("sm_90", "H100, H200", 90, 90, ("10.3", "11.4"), "13.0", 85, 80, 3350.0, plugins="aot"),
    Target("sm_120", "RTX 50 series", 120, 120, ("10.8", "11.4"), "13.0", 87, 8, 448.0, plugins="aot"),
)
TARGETS = {target.name: target for target in _ROWS}


def get_target(name: str) -> Target:
    """Return the target called `name`, or raise EA0102 with the nearest names."""
    if name not in TARGETS:
        hint = near(name, list(TARGETS)) or f"; known: {', '.join(TARGETS)}"
        raise UsageError("EA0102", f"{name}: no such target{hint}")
    return TARGETS[name]
