"""Progress on stderr: one live line for the current stage on a terminal, lines and heartbeats elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

_LIVE_INTERVAL = 0.2
_CLEAR = "\r\x1b[2K"


@dataclass
class Stage:
    """One step of a command: set `result` to the text that its last line shows, `fraction` where it is known."""

    name: str
    what: str = ""
    result: str = ""
    fraction: float | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Return the seconds since the stage began."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """Return the finished stage as a row: name, what, seconds and result."""
        return f"  {self.name:<10} {self.what:<22} {self.seconds:>6.1f} s   {self.result}".rstrip()

    def running(self) -> str:
        """Return the row of a stage under way: percent and time left where the fraction is known."""
        elapsed = self.elapsed()
        row = f"  {self.name:<10} {self.what:<22} {elapsed:>6.1f} s"
        if not self.fraction:
            return row
        left = elapsed * (1 - self.fraction) / self.fraction
        return f"{row}   {self.fraction:4.0%}, {left:.0f} s left"


class Progress:
    """Tells the story of a command on `stream` (stderr), and keeps its finished stages in `stages`.

    `live` rewrites one line, which a finished stage takes away: the result of the command tells of all stages. It is
    the default on a terminal; elsewhere a stage has a line at its start and end, and one every `heartbeat` seconds.
    With `enabled=False` nothing is written and stages are only recorded.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        live: bool | None = None,
        heartbeat: float = 30.0,
    ) -> None:
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.live = self.stream.isatty() if live is None else live
        self.heartbeat = heartbeat
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[Stage]:
        """Time the enclosed step and show it; a step that raises is shown as failed and not recorded."""
        stage = Stage(name, what)
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(stage, done), daemon=True)
        self._begin(stage)
        if self.enabled:
            ticker.start()
        try:
            yield stage
        except BaseException:
            self._stop(done, ticker)
            self._end(f"{stage.running()}   failed\n")
            raise
        self._stop(done, ticker)
        stage.seconds = stage.elapsed()
        self.stages.append(stage)
        self._end("" if self.live else f"{stage.line()}\n")

    def note(self, text: str) -> None:
        """Write one line between stages: something the user should know that is no error."""
        if self.enabled:
            self._write(f"{_CLEAR if self.live else ''}{text}\n")

    def _begin(self, stage: Stage) -> None:
        if self.enabled and not self.live:
            self._write(f"  {stage.name:<10} {f'{stage.what} ...'.lstrip()}\n")

    def _end(self, line: str) -> None:
        if self.enabled:
            self._write(f"{_CLEAR if self.live else ''}{line}")

    def _tick(self, stage: Stage, done: threading.Event) -> None:
        """Repeat the row of a running stage until it is done."""
        while not done.wait(_LIVE_INTERVAL if self.live else self.heartbeat):
            self._write(f"{_CLEAR}{stage.running()}" if self.live else f"{stage.running()} ...\n")

    def _stop(self, done: threading.Event, ticker: threading.Thread) -> None:
        done.set()
        if ticker.is_alive():
            ticker.join()

    def _write(self, text: str) -> None:
        # A closed terminal must not end a long export.
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()
