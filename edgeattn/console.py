"""The terminal: results on stdout, errors on stderr, one JSON document with `--json`, and the exit code of each."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from edgeattn.errors import EdgeAttnError

OK, INTERNAL = 0, 1
_LOG = logging.getLogger(__name__)
_RED, _GREEN, _YELLOW, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
_COLORS = {"PASS": _GREEN, "ok": _GREEN, "warn": _YELLOW, "FAIL": _RED, "fail": _RED, "error": _RED}


@dataclass(frozen=True)
class Result:
    """What a verb returns: the text for people, the document for programs, and the exit code."""

    text: str
    document: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = OK


def colored(mode: str, stream: TextIO) -> bool:
    """Tell whether to colour: always, never, or on a terminal unless NO_COLOR is set."""
    if mode != "auto":
        return mode == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(word: str, color: bool) -> str:
    """Return a verdict word in its colour."""
    return f"{_COLORS[word]}{word}{_RESET}" if color and word in _COLORS else word


def print_result(verb: str, result: Result, *, as_json: bool, stream: TextIO) -> None:
    """Write the result: its text, or one JSON document headed by schema, verdict and exit code."""
    if as_json:
        verdict = "pass" if result.exit_code == OK else "fail"
        head = {"schema": f"edgeattn.{verb}/1", "verdict": verdict, "exit_code": result.exit_code}
        stream.write(_dump({**head, **result.document}))
    elif result.text:
        stream.write(result.text.rstrip("\n") + "\n")
    stream.flush()


def print_error(verb: str, error: EdgeAttnError, *, as_json: bool, color: str, stream: TextIO) -> int:
    """Write the error on stderr and, as a document, on `stream`; return its exit code."""
    text = str(error)
    if colored(color, sys.stderr):
        text = text.replace("error", paint("error", True), 1)
    print(text, file=sys.stderr)
    _LOG.debug("%s", error.code, exc_info=error)
    if as_json and error.exit_code != INTERNAL:
        head = {"schema": f"edgeattn.{verb}/1", "verdict": "error", "exit_code": error.exit_code}
        stream.write(_dump({**head, "error": error.as_dict()}))
        stream.flush()
    return error.exit_code


def print_crash(error: BaseException) -> int:
    """Save the traceback of a bug, say where, and return exit code 1."""
    text = "".join(traceback.format_exception(error))
    _LOG.debug("internal error", exc_info=error)
    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]
    print(f"error[EA0001]: internal error: {last}", file=sys.stderr)
    print(f"  where: {_save(text)}", file=sys.stderr)
    print("  try:   report it with this file", file=sys.stderr)
    return INTERNAL


def _save(text: str) -> str:
    """Write a traceback to a file of its own and return its path; a full disk must not hide the error."""
    try:
        handle, path = tempfile.mkstemp(prefix="edgeattn-", suffix=".log", text=True)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        print(text, file=sys.stderr)
        return "the traceback above"
    return str(Path(path))


def _dump(document: Mapping[str, Any]) -> str:
    return json.dumps(_plain(document), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Return `value` in JSON's types: non-finite numbers become text, as JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
