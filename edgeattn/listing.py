"""Files of one kind in a folder, in an order that does not depend on the file system."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from edgeattn.errors import UsageError


def list_files(folder: Path, suffixes: Collection[str], kind: str) -> list[Path]:
    """Return the files in `folder` and its subfolders, sorted by path; hidden entries are passed over.

    `kind` is what EA0140 calls them when there is none.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        fitting = (name for name in files if not name.startswith(".") and Path(name).suffix.lower() in suffixes)
        found += [Path(place, name) for name in fitting]
    if not found:
        raise UsageError("EA0140", f"{folder}: no {kind} in it", hints=[f"known: {' '.join(sorted(suffixes))}"])
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())
