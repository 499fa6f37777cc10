"""What commands print when they are done: an export as its table of stages, a weight file as its differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.bundle import Bundle
from edgeattn.console import Result
from edgeattn.progress import Stage
from edgeattn.tensors import TensorSpec

if TYPE_CHECKING:
    from edgeattn.weights import Loaded

_WIDTH = 80


def exported(made: Bundle | Mapping[str, Any], stages: Sequence[Stage]) -> Result:
    """Return the table of a finished export, or of one that stopped before a bundle was written."""
    rows = [stage.line() for stage in stages]
    entries = [{"name": s.name, "what": s.what, "seconds": round(s.seconds, 3), "result": s.result} for s in stages]
    if not isinstance(made, Bundle):
        head = _headline(made["model"], made["options"], made["inputs"])
        text = [head, *rows, f"{made['status']} ({made['output']})"]
        return Result("\n".join(text), {**made, "stages": entries})
    size = sum((made.path / name).stat().st_size for name in made.files)
    document = {
        "bundle": str(made.path),
        "bundle_sha256": made.sha256,
        "bytes": size,
        "name": made.name,
        "model": made.manifest["model"],
        "options": made.manifest["options"],
        "stages": entries,
        "warnings": _warnings(made),
    }
    head = _headline(made.manifest["model"]["variant"], made.manifest["options"], made.manifest["inputs"])
    text = [head, *rows, f"bundle: {made.path}   ({size / 1e6:.1f} MB)"]
    text += [f"note:   {warning}" for warning in document["warnings"]]
    return Result("\n".join([*text, f"next:   edgeattn validate {made.path}"]), document)


def compared(name: str, found: Loaded) -> Result:
    """Return how a weight file compares with a model: exit code 2 when it does not fit."""
    verdict = "fits" if found.fits else "does not fit"
    lines = [f"{found.file}: {verdict} {name}: {found.summary()}", f"sha256 {found.sha256}"]
    lines += [f"wrapper {found.wrapper}"] if found.wrapper else []
    lines += [f"ignored ({len(found.ignored)}): {', '.join(found.ignored)}"] if found.ignored else []
    document = {"model": name, "fits": found.fits, **asdict(found)}
    return Result("\n".join([*lines, *found.differences()]), document, 0 if found.fits else 2)


def _headline(model: str, options: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> str:
    shapes = [TensorSpec.from_dict(entry) for entry in inputs]
    words = [f"{spec.name}={'x'.join(dim.name or str(dim) for dim in spec.dims)}" for spec in shapes]
    left = "  ".join([model, options["precision"], *options["targets"], *words])
    return f"{left:<{_WIDTH - 16}} edgeattn {__version__}"


def _warnings(bundle: Bundle) -> list[str]:
    """Return what must not be overlooked about this bundle."""
    seeded = bundle.manifest["model"]["weights_sha256"] == "seeded"
    found = ["seeded weights, NOT trained ones: numbers can be checked, classes mean nothing"] if seeded else []
    for target in bundle.manifest["targets"]:
        missing = [what for what in ("kernels", "engine") if target.get(what) == "not built"]
        if missing and target["name"] != "portable":
            found.append(f"{target['name']}: {' and '.join(missing)} not built yet")
    return found
