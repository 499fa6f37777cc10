"""The authors' weight files in the user's cache: fetched once, hash recorded then and compared ever after."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from edgeattn.errors import IncompatibleError, MissingError, UsageError
from edgeattn.hashing import BLOCK, hash_file
from edgeattn.model import Model
from edgeattn.progress import Progress, Stage

_TIMEOUT = 30.0  # seconds of silence on the line
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """Return the folder of everything that can be made again: EDGEATTN_CACHE, else edgeattn in the user cache."""
    if chosen := os.environ.get("EDGEATTN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeattn"


def official_weights(model: Model, progress: Progress | None = None) -> Path:
    """Return the authors' weight file of `model`, downloaded on first use; its hash is the one recorded then.

    Raises EA0124 without a usable address, EA0202 or EA0203 for a cache that cannot be written, EA0210 when the
    download fails and EA0910 for a hash that differs. A failed download leaves nothing behind.
    """
    url = model.checkpoint.url
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(
            "EA0124",
            f"{model.name}: the catalogue has no address for the authors' weights",
            hints=["--weights FILE takes a checkpoint", f"the authors: {model.source}"],
        )
    file = cache_folder() / "weights" / _file_name(url)
    with _cache_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            _compare(file, hash_file(file), f"{file}: changed since it was downloaded")
        else:
            _fetch(url, file, model.name, progress or Progress(enabled=False))
    return file


def _file_name(url: str) -> str:
    """Return the name in the cache: the publisher's, after a short key of the whole address."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    return f"{key}-{re.sub(r'[^A-Za-z0-9._-]', '_', name) or 'weights'}"


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _compare(file: Path, sha256: str, message: str) -> None:
    """Raise EA0910 with `message` unless `sha256` is the recorded one; record it when it is the first."""
    record = _record(file)
    if not record.is_file():
        record.write_text(f"{sha256}  {file.name}\n", encoding="ascii")  # as sha256sum -c reads it
    recorded = record.read_text(encoding="ascii", errors="replace").partition(" ")[0]
    if sha256 == recorded:
        return
    raise IncompatibleError(
        "EA0910",
        message,
        why=f"sha256 {sha256[:16]}, recorded at the first download: {recorded[:16]}",
        hints=[f"delete {file} to download it again", f"delete {record} too if the authors replaced the file"],
    )


def _fetch(url: str, file: Path, name: str, progress: Progress) -> None:
    """Download to a temporary sibling, compare or record the hash, rename."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with progress.stage("download", name) as stage:
            sha256 = _save(url, part, stage)
        _compare(file, sha256, f"{url}: not the file that was downloaded first")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _save(url: str, part: Path, stage: Stage) -> str:
    """Write what is at `url` to `part` and return its SHA-256."""
    digest, done, total = hashlib.sha256(), 0, 0
    with part.open("wb") as target:
        for block, total in _blocks(url):
            if not done:
                _check_start(url, block, max(total, len(block)), part.parent)
            digest.update(block)
            target.write(block)
            done += len(block)
            stage.fraction = done / total if total else None
            stage.result = f"{done / 1e6:.1f} MB"
    if not done or done < total:
        raise _failed(url, f"the connection ended after {done} of {total or 'an unknown number of'} bytes")
    return digest.hexdigest()


def _blocks(url: str) -> Iterator[tuple[bytes, int]]:
    """Yield the content in blocks, each with the total size (0: unknown); network errors become EA0210."""
    request = urllib.request.Request(url, headers={"User-Agent": "edgeattn"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(BLOCK):
                yield block, total
    except urllib.error.HTTPError as error:
        raise _failed(url, f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _failed(url, f"no connection: {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed(url, f"the connection failed: {error or type(error).__name__}") from error


def _check_start(url: str, block: bytes, size: int, folder: Path) -> None:
    """Refuse a web page in the file's place, and a file that the disk cannot hold."""
    if block.lstrip()[:1] == b"<":
        raise _failed(url, "it answers with a web page, not a file")
    if size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.1f} MB needed")


def _failed(url: str, why: str) -> MissingError:
    hints = ["download it by other means and give it with --weights FILE"]
    return MissingError("EA0210", f"{url}: download failed: {why}", hints=hints)


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about the cache folder into errors that name it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise MissingError("EA0203", f"{folder}: disk full; nothing was kept", why=reason) from error
        hints = ["EDGEATTN_CACHE names another folder"]
        raise MissingError("EA0202", f"{folder}: the cache cannot be used: {reason}", hints=hints) from error
