"""The errors a user can cause: every one has a stable id, a place, a reason, a next step and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EdgeAttnError(Exception):
    """Base of all errors that are reported in one line instead of a traceback.

    `code` is the stable id ("EA0101"), `message` the line that must do alone; `where` names the place, `why` the
    reason and `hints` what to try next.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, where: str = "", why: str = "", hints: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = where
        self.why = why
        self.hints = tuple(hints)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        lines += [f"  where: {self.where}"] if self.where else []
        lines += [f"  why:   {self.why}"] if self.why else []
        lines += [f"  try:   {hint}" for hint in self.hints]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the error as the `error` object of a JSON document."""
        return {
            "code": self.code,
            "message": self.message,
            "where": self.where,
            "why": self.why,
            "hints": list(self.hints),
        }


class UsageError(EdgeAttnError):
    """Bad option or configuration, unknown name, unusable input (exit 2; ids 01xx)."""

    exit_code = 2


class MissingError(EdgeAttnError):
    """A package, device, tool, permission or disk space is missing (exit 3; ids 02xx)."""

    exit_code = 3


class UnsupportedError(EdgeAttnError):
    """An operator, shape or precision has no lowering (exit 4; ids 03xx capture, 04xx lowering)."""

    exit_code = 4


class BuildError(EdgeAttnError):
    """A kernel compilation, ONNX parse or engine build failed (exit 5; ids 05xx kernels, 06xx build)."""

    exit_code = 5


class AccuracyError(EdgeAttnError):
    """An accuracy gate or a stage's own check failed (exit 6; ids 07xx)."""

    exit_code = 6


class LatencyError(EdgeAttnError):
    """A latency, memory, regression or stability gate failed (exit 7; ids 08xx)."""

    exit_code = 7


class IncompatibleError(EdgeAttnError):
    """A bundle or engine does not fit this device or version, or a hash differs (exit 8; ids 09xx)."""

    exit_code = 8


class RemoteError(EdgeAttnError):
    """ssh, copy or remote timeout (exit 9; ids 10xx)."""

    exit_code = 9
