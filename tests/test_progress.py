"""Progress: one live line on a terminal, lines and heartbeats elsewhere, silence when asked for."""

from __future__ import annotations

import io
import threading
import time

import pytest

from edgeattn.progress import Progress, Stage


def test_lines_at_start_and_end_elsewhere():
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.stage("trace", "torch.export") as stage:
        assert stream.getvalue() == "  trace      torch.export ...\n"
        stage.result = "612 nodes"
    _, end = stream.getvalue().splitlines()
    assert end.split() == ["trace", "torch.export", "0.0", "s", "612", "nodes"]
    assert "\x1b" not in stream.getvalue()
    assert [stage.name for stage in progress.stages] == ["trace"]


def test_heartbeat():
    stream = io.StringIO()
    with Progress(stream, heartbeat=0.02).stage("build"):
        deadline = time.monotonic() + 10
        while stream.getvalue().count("\n") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert all(line.split()[0] == "build" for line in stream.getvalue().splitlines())


def test_one_live_line_on_a_terminal():
    stream = io.StringIO()
    with Progress(stream, live=True).stage("trace", "torch.export") as stage:
        stage.fraction = 0.25
        deadline = time.monotonic() + 10
        while "25%" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    text = stream.getvalue()
    assert "25%" in text
    assert "left" in text
    assert "\n" not in text
    assert text.endswith("\r\x1b[2K"), "a finished stage takes its line away"


@pytest.mark.parametrize("live", [True, False])
def test_a_failed_stage_stays_and_is_not_recorded(live):
    stream = io.StringIO()
    progress = Progress(stream, live=live)
    with pytest.raises(ValueError, match="bug"), progress.stage("trace"):
        raise ValueError("bug")
    assert stream.getvalue().rstrip().endswith("failed")
    assert not progress.stages


def test_silence():
    stream = io.StringIO()
    progress = Progress(stream, enabled=False, heartbeat=0.001)
    with progress.stage("trace"):
        time.sleep(0.02)
    progress.note("nothing")
    assert not stream.getvalue()
    assert progress.stages[0].seconds > 0


def test_a_closed_stream_is_no_reason_to_stop():
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.stage("trace"):
        stream.close()
    assert progress.stages


def test_no_thread_is_left():
    before = threading.active_count()
    for _ in range(5):
        with Progress(io.StringIO()).stage("trace"):
            pass
    assert threading.active_count() == before


def test_a_row_is_aligned_for_the_table():
    stage = Stage("check", "model.onnx vs PyTorch", result="PASS", seconds=2.04)
    assert stage.line() == "  check      model.onnx vs PyTorch     2.0 s   PASS"
