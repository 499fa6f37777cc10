"""The authors' weight files over the network: every answer a server can give, and a cache that remembers."""

from __future__ import annotations

import contextlib
import re
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from edgeattn import download
from edgeattn.download import official_weights
from edgeattn.errors import EdgeAttnError, IncompatibleError, MissingError, UsageError
from edgeattn.model import MODELS, Checkpoint
from edgeattn.progress import Progress, Stage


class Server(ThreadingHTTPServer):
    """Serves `content`, cut to `sent` bytes under a full Content-Length, or answers `status`."""

    content = b"\x80weights" * 400_000
    sent: int | None = None
    status = 200
    requests = 0


class Handler(BaseHTTPRequestHandler):
    """One answer, as the server says."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a local server, with an empty cache and no proxy in between."""
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _model(server: Server, name: str = "w.pth") -> Any:
    url = f"http://127.0.0.1:{server.server_port}/releases/{name}"
    return replace(MODELS.get("shvit_s1"), name="small", checkpoint=Checkpoint(url))


def _cached() -> list[str]:
    return sorted(file.name.partition("-")[2] for file in (download.cache_folder() / "weights").iterdir())


def _download_error(server: Server) -> EdgeAttnError:
    with pytest.raises(EdgeAttnError) as caught:
        official_weights(_model(server))
    return caught.value


def test_download_once_then_from_the_cache(server: Server) -> None:
    story = StringIO()
    path = official_weights(_model(server), Progress(story))
    assert path.read_bytes() == server.content
    assert "download" in story.getvalue()
    assert f"{len(server.content) / 1e6:.1f} MB" in story.getvalue()
    assert official_weights(_model(server)) == path
    assert server.requests == 1
    assert _cached() == ["w.pth", "w.pth.sha256"]
    assert official_weights(_model(server, "other.pth")) != path


class Recorder(Progress):
    """Keeps every row that a live terminal could have shown."""

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[Stage]:
        """Hand out a stage that records its row whenever its fraction changes."""
        rows = self.rows = []

        class Recorded(Stage):
            def __setattr__(self, key: str, value: Any) -> None:
                super().__setattr__(key, value)
                if key == "fraction" and value:
                    rows.append(self.running())

        yield Recorded(name, what)


def test_download_shows_percent_and_time_left(server: Server) -> None:
    progress = Recorder()
    official_weights(_model(server), progress)
    assert re.search(r"download +small .* 33%, \d+ s left", progress.rows[0])
    assert "100%, 0 s left" in progress.rows[-1]


def test_changed_cache_is_refused(server: Server) -> None:
    path = official_weights(_model(server))
    path.write_bytes(path.read_bytes()[:-1])
    error = _download_error(server)
    assert isinstance(error, IncompatibleError)
    assert (error.code, server.requests) == ("EA0910", 1)
    assert "changed since it was downloaded" in error.message
    path.unlink()
    assert official_weights(_model(server)).read_bytes() == server.content


def test_replaced_file_at_the_address_is_refused(server: Server) -> None:
    path = official_weights(_model(server))
    path.unlink()
    server.content = b"\x80other" * 1000
    error = _download_error(server)
    assert (error.code, error.exit_code) == ("EA0910", 8)
    assert _cached() == ["w.pth.sha256"]
    (path.parent / f"{path.name}.sha256").unlink()
    assert official_weights(_model(server)).read_bytes() == server.content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 404}, "the server answers 404"),
        ({"status": 503}, "the server answers 503"),
        ({"sent": 1_500_000}, "1500000 of 3200000 bytes"),
        ({"content": b""}, "0 of"),
        ({"content": b"\n<html>sign in</html>"}, "a web page"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_failed_download_leaves_nothing(change: dict[str, Any], words: str, server: Server) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    error = _download_error(server)
    assert isinstance(error, MissingError)
    assert (error.code, error.exit_code) == ("EA0210", 3)
    assert words in error.message
    assert _cached() == []
    server.status, server.sent, server.content = Server.status, None, Server.content
    assert official_weights(_model(server)).read_bytes() == Server.content


def test_no_network(server: Server) -> None:
    model = _model(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(MissingError, match="no connection") as caught:
        official_weights(model)
    assert caught.value.code == "EA0210"


@pytest.mark.parametrize("url", ["", "file:///etc/hostname"])
def test_no_usable_address(url: str) -> None:
    model = replace(MODELS.get("shvit_s1"), checkpoint=Checkpoint(url))
    with pytest.raises(UsageError, match="no address") as caught:
        official_weights(model)
    assert caught.value.code == "EA0124"
    assert any("--weights FILE" in hint for hint in caught.value.hints)


def test_disk_full_while_downloading(server: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        error = _download_error(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.code, error.exit_code) == ("EA0203", 3)
    assert "disk full" in error.message
    assert _cached() == []


def test_disk_too_small_for_the_download(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    error = _download_error(server)
    assert error.code == "EA0203"
    assert "3.2 MB needed" in error.why
    assert _cached() == []


def test_cache_that_cannot_be_made(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "file"))
    error = _download_error(server)
    assert (error.code, error.exit_code) == ("EA0202", 3)
    assert any("EDGEATTN_CACHE" in hint for hint in error.hints)
