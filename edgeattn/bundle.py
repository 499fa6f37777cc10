"""The bundle: one folder per compiled model, written under a temporary name, hashed, and checked when it is used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.detection import Detector
from edgeattn.errors import EdgeAttnError, IncompatibleError, MissingError, UsageError
from edgeattn.hashing import hash_file
from edgeattn.tensors import TensorSpec, read_arrays

MANIFEST = "manifest.json"
SCHEMA = "edgeattn.bundle/1"
_KEYS = (
    "schema", "name", "model", "inputs", "outputs", "precision", "ops", "targets", "stages", "tool_versions", "files",
    "engines", "options",
)  # fmt: skip
# Copies for boards leave the original out, and every command adds a report: neither is part of what must be there.
_OPTIONAL = "reference/"
_UNHASHED = "reports/"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class Bundle:
    """An opened bundle: the manifest has been read and its form checked; files are checked when they are used."""

    def __init__(self, path: Path, manifest: dict[str, Any], sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        self.inputs = tuple(TensorSpec.from_dict(entry) for entry in manifest["inputs"])
        self.outputs = tuple(TensorSpec.from_dict(entry) for entry in manifest["outputs"])

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest in folder `path`.

        Raises EA0106 when there is no bundle, EA0901 for another schema, EA0902 for a damaged manifest and EA0903 for
        a missing file.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            found = "no manifest.json in it" if folder.is_dir() else "a file" if folder.exists() else "does not exist"
            raise UsageError("EA0106", f"{folder}: not a bundle ({found})", hints=["edgeattn export MODEL writes one"])
        content = (folder / MANIFEST).read_bytes()
        manifest = _parse(content, folder)
        try:
            bundle = cls(folder, manifest, hashlib.sha256(content).hexdigest())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(folder, f"inputs or outputs: {error!r}") from error
        bundle._check_present()
        return bundle

    @property
    def name(self) -> str:
        """Return the name of the model with its precision."""
        return str(self.manifest["name"])

    @property
    def precision(self) -> str:
        """Return the precision of the graph."""
        return str(self.manifest["precision"])

    @property
    def files(self) -> Mapping[str, str]:
        """Return the recorded files: relative path to SHA-256."""
        files: dict[str, str] = self.manifest["files"]
        return files

    @property
    def detector(self) -> Detector | None:
        """Return how candidates become detections, for a model that finds boxes."""
        entry = self.manifest.get("detector")
        return Detector.from_dict(entry) if entry else None

    @property
    def labels(self) -> list[str] | None:
        """Return the class names in `labels.txt`, one per line, where the bundle has them."""
        if "labels.txt" not in self.files:
            return None
        self.verify("labels.txt")
        return self.file("labels.txt").read_text(encoding="utf-8").splitlines()

    def file(self, relative: str) -> Path:
        """Return the path of a file in the bundle. Raises EA0905 when it lies outside, EA0903 when it is absent."""
        root = self.path.resolve()
        resolved = (root / relative).resolve()
        if not resolved.is_relative_to(root) or resolved == root:
            raise IncompatibleError("EA0905", f"{relative}: leads out of the bundle", where=str(self.path))
        if not resolved.is_file():
            raise IncompatibleError("EA0903", f"{relative}: missing from {self.path}", hints=[self._again()])
        return resolved

    def verify(self, *files: str) -> None:
        """Compare `files` (default: all that are recorded) with their hashes; raise EA0904 for a difference."""
        for relative in files or tuple(name for name in self.files if (self.path / name).exists()):
            expected = self.files.get(relative)
            if expected is None:
                raise IncompatibleError("EA0904", f"{relative}: not recorded in {self.path / MANIFEST}")
            found = hash_file(self.file(relative))
            if found != expected:
                raise IncompatibleError(
                    "EA0904",
                    f"{relative}: changed since it was written",
                    where=str(self.path),
                    why=f"sha256 {found[:12]}, the manifest says {expected[:12]}",
                    hints=[self._again()],
                )

    def arrays(self, relative: str) -> dict[str, np.ndarray]:
        """Return the arrays of a recorded `.npz`, hash checked."""
        self.verify(relative)
        return read_arrays(self.file(relative))

    def validate(self, **options: Any) -> Any:
        """Compare this bundle with the PyTorch original; options and result as of `edgeattn.validate`."""
        from edgeattn.validate import validate

        return validate(self, **options)

    def bench(self, **options: Any) -> Any:
        """Measure the latency of this bundle; options and result as of `edgeattn.bench`."""
        from edgeattn.validate import bench

        return bench(self, **options)

    def _again(self) -> str:
        return f"edgeattn export {self.manifest['model'].get('variant', 'MODEL')} -o {self.path} --force"

    def _check_present(self) -> None:
        for relative in self.files:
            if not relative.startswith(_OPTIONAL):
                self.file(relative)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.name!r})"


def hash_files(folder: Path) -> dict[str, str]:
    """Return relative path to SHA-256 of every file in `folder` but the manifest and the reports, in sorted order."""
    relatives = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    recorded = [name for name in relatives if name != MANIFEST and not name.startswith(_UNHASHED)]
    return {name: hash_file(folder / name) for name in recorded}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` of the finished `folder` with the schema and every file's hash: same input, same bytes."""
    complete = {**manifest, "schema": SCHEMA, "files": hash_files(folder)}
    complete.setdefault("engines", [])
    absent = [key for key in _KEYS if key not in complete]
    if absent:
        raise ValueError(f"manifest without {', '.join(absent)}")
    write_json(folder / MANIFEST, complete)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document in one deterministic form: sorted keys, two spaces, newline at the end."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and is removed when it does not.

    The folder is a hidden sibling of `path`, so the last step is one rename; with `force` the old bundle is there until
    then. An error, Ctrl-C or SIGTERM leaves nothing. Raises EA0105 for an existing output, EA0108 for an output that is
    not a bundle, EA0202 without permission and EA0203 when the disk is full.
    """
    final = Path(path)
    check_output(final, force)
    folder = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with _terminable():
        try:
            folder.mkdir()
            yield folder
            _replace(final, folder, force)
        except EdgeAttnError:
            raise
        except Exception as error:
            known = environment_error(error, final, folder)
            if known is None:
                raise
            raise known from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_output(final: Path, force: bool) -> None:
    """Refuse an output that exists or cannot be created: EA0105 and EA0108."""
    if not final.parent.is_dir():
        raise UsageError("EA0105", f"{final.parent}: no such folder", hints=[f"mkdir -p {final.parent}"])
    if not os.path.lexists(final):
        return
    if not force:
        raise UsageError("EA0105", f"{final}: already exists", hints=["--force replaces it, -o names another folder"])
    if not (final / MANIFEST).is_file() and not (final.is_dir() and not any(final.iterdir())):
        raise UsageError("EA0108", f"{final}: not a bundle, will not be replaced", hints=["-o names another folder"])


def _replace(final: Path, folder: Path, force: bool) -> None:
    """Give the finished folder its name; what stood there is back if that fails."""
    check_output(final, force)  # another process may have been faster
    if not os.path.lexists(final):
        os.rename(folder, final)
        return
    old = folder.with_suffix(".old")
    os.rename(final, old)
    try:
        os.rename(folder, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def environment_error(error: BaseException, final: Path, folder: Path) -> MissingError | None:
    """Return the error of a full disk or a missing permission, looking through what libraries wrap around it."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        # safetensors reports the system's error as text only.
        if number in _FULL or "os error 28" in str(cause) or "No space left on device" in str(cause):
            why = f"{shutil.disk_usage(final.parent).free / 2**20:.0f} MiB free"
            return MissingError("EA0203", f"{final}: disk full while writing; nothing was kept", why=f"{cause} ({why})")
        if isinstance(cause, OSError) and _concerns(cause, folder):
            reason = cause.strerror or str(cause)
            return MissingError("EA0202", f"{final}: cannot be written: {reason}", hints=["-o names another folder"])
        cause = cause.__cause__ or cause.__context__
    return None


def _concerns(error: OSError, folder: Path) -> bool:
    """Tell whether the system refused to create `folder`, or something in it or beside it."""
    place = str(error.filename or "")
    if place == str(folder):
        return True
    return error.errno in _DENIED and (not place or place.startswith(str(folder.parent)))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs clean-up code, where nobody else handles it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parse(content: bytes, folder: Path) -> dict[str, Any]:
    """Return the manifest once its schema and required keys have been checked."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(manifest, dict):
        raise _damaged(folder, "not a JSON object")
    schema = manifest.get("schema")
    if not re.fullmatch(rf"{SCHEMA}(\.\d+)?", str(schema)):
        raise IncompatibleError(
            "EA0901",
            f"{folder}: unknown bundle schema {schema!r}, this edgeattn reads {SCHEMA!r}",
            hints=["use the edgeattn that wrote it, or export again"],
        )
    absent = [key for key in _KEYS if key not in manifest]
    if absent:
        raise _damaged(folder, f"without {', '.join(absent)}")
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["model"], dict):
        raise _damaged(folder, "files and model must be objects")
    return manifest


def _damaged(folder: Path, why: str) -> IncompatibleError:
    return IncompatibleError(
        "EA0902", f"{folder / MANIFEST}: damaged manifest", why=why, hints=["copy the bundle again, or export again"]
    )
