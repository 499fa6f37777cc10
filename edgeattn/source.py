"""What is to be compiled: a catalogue name, `package.module:factory` or a `.pt2` file, as a module and its inputs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeattn.capacity import Capacities
from edgeattn.detection import Array, Detector, align
from edgeattn.download import official_weights
from edgeattn.errors import UsageError
from edgeattn.model import MODELS, Capacity, InputSpec, Model
from edgeattn.originals import load_program
from edgeattn.progress import Progress
from edgeattn.tensors import Dim, TensorSpec
from edgeattn.weights import load_checkpoint, seed_weights

_OWN = Capacities()
# What users call the axes of an image [batch, 3, height, width].
_AXES = {"batch": 0, "n": 0, "height": 2, "h": 2, "width": 3, "w": 3}
_INPUT = re.compile(r"(?P<name>\w+)(?::(?P<dtype>\w+))?=(?P<dims>\w+(?:x\w+)*)")
_DIM = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<min>\d+):(?P<max>\d+)(?::(?P<opt>\d+))?")


@dataclass(frozen=True)
class Source:
    """The PyTorch original with its inputs; `model` is its catalogue entry.

    `weights` is the SHA-256 of the weight file, "seeded" or "own"; `partial` says what of the file did not fit.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    weights: str
    model: Model | None = None
    program: torch.export.ExportedProgram | None = None
    partial: str = ""

    @property
    def detector(self) -> Detector | None:
        """Return the `detector` entry of the manifest, for a model that finds boxes."""
        return self.model.detector if self.model else None

    def in_one_order(self, found: Sequence[Array], expected: Sequence[Array]) -> tuple[list[Array], list[Array], float]:
        """Return both results with a detector's candidates paired, and the share that both have; else as they are."""
        if self.detector is None:
            return list(found), list(expected), 1.0
        ours, theirs, share = align(*(dict(zip(self.outputs, each, strict=True)) for each in (found, expected)))
        return list(ours.values()), list(theirs.values()), share

    @property
    def identity(self) -> dict[str, Any]:
        """Return the `model` entry of the manifest."""
        family = self.model.family if self.model else "user"
        source = self.model.source if self.model else self.name
        entry = {"family": family, "variant": self.name, "source": source, "weights_sha256": self.weights}
        return {**entry, "weights_partial": self.partial} if self.partial else entry


def resolve(
    model: str,
    *,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    dims: Sequence[str] = (),
    capacities: Capacities = _OWN,
    split: str | None = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Return what `model` names, weights loaded.

    `inputs` are NAME=1x3x224x224 (or NAME:dtype=...), `dims` NAME=min:max[:opt]; `capacities` are for detectors. Raises
    EA0101 for an unknown model, EA0111 and EA0115 for an option that does not fit, and what the weight file is refused
    for.
    """
    ranges = {dim.name: dim for dim in map(_read_dim, dims)}
    shapes = dict(_read_input(text, ranges) for text in inputs)
    entry = None if model.endswith(".pt2") or ":" in model else MODELS.get(model)
    if capacities and (entry is None or entry.detector is None):
        raise UsageError(
            "EA0115", f"{model}: takes no point clouds, so it has no --max-points, --max-voxels, --max-sets"
        )
    if split is not None and (entry is None or entry.detector is None or split != "blocks"):
        raise UsageError("EA0115", f"--split {split}: only blocks, of a model that takes point clouds")
    if model.endswith(".pt2"):
        return _from_file(Path(model), shapes, weights)
    if ":" in model:
        return _from_factory(model, shapes, weights)
    assert entry is not None
    if entry.detector is not None and (shapes or ranges):
        raise UsageError("EA0111", f"{model}: its inputs are fixed", hints=["--max-points changes how many points fit"])
    specs = tuple(_spec(spec, shapes, ranges) for spec in entry.inputs)
    _refuse_unknown(shapes, [spec.name for spec in specs])
    module: Any = entry.build().eval()
    if entry.detector is not None:
        module.limit(capacities.points, capacities.voxels, capacities.sets)
        specs = tuple(_with_capacity(spec, module.capacity) for spec in specs)
    digest, partial = _load(module, entry, weights, allow_partial, progress)
    if split:
        return Source(f"{entry.name}-{split}", module.blocks().eval(), module.block_inputs(), ("output",), digest)
    return Source(entry.name, module, specs, entry.outputs, digest, entry, partial=partial)


def _load(
    module: nn.Module, entry: Model, weights: str | None, allow_partial: bool, progress: Progress | None
) -> tuple[str, str]:
    """Load or seed the weights; return the file's SHA-256 (or "seeded") and what of it did not fit."""
    if weights is None:
        seed_weights(module)
        return "seeded", ""
    path = official_weights(entry, progress) if weights == "official" else Path(weights)
    loaded = load_checkpoint(module, path, entry.checkpoint, allow_partial=allow_partial)
    if progress and not loaded.fits:
        progress.note(f"{path}: loaded in part, the rest seeded: {loaded.summary()}")
        for line in loaded.differences():
            progress.note(f"  {line}")
    return loaded.sha256, "" if loaded.fits else loaded.summary()


def _from_factory(name: str, shapes: Mapping[str, TensorSpec], weights: str | None) -> Source:
    if weights is not None:
        raise UsageError("EA0113", "--weights: a factory loads its own weights", where=name)
    if not shapes:
        raise UsageError("EA0111", f"{name}: give its inputs", hints=["--input NAME=1x3x224x224, one per argument"])
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError("EA0101", f"{name}: cannot be imported: {error}", where=folder) from error
    finally:
        sys.path.remove(folder)
    module = factory() if not isinstance(factory, nn.Module) else factory
    if not isinstance(module, nn.Module):
        raise UsageError("EA0101", f"{name}: returns {type(module).__name__}, not a torch.nn.Module")
    return Source(attribute, module.eval(), tuple(shapes.values()), (), "own")


def _from_file(path: Path, shapes: Mapping[str, TensorSpec], weights: str | None) -> Source:
    if weights is not None or shapes:
        raise UsageError(
            "EA0113", f"{path}: a .pt2 file has its own weights and inputs", hints=["leave the option out"]
        )
    if not path.is_file():
        raise UsageError("EA0101", f"{path}: no such file")
    program = load_program(path)
    return Source(path.stem, program.module(), program_inputs(program), (), "own", program=program)


def program_inputs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    """Return the inputs of an exported program; a dynamic size has the range the program was traced with."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in map(str, names):
        value = nodes[name].meta["val"]
        dims = tuple(_program_dim(program, size) for size in value.shape)
        specs.append(TensorSpec(name, str(value.dtype).removeprefix("torch."), dims))
    return tuple(specs)


def _program_dim(program: torch.export.ExportedProgram, size: Any) -> Dim:
    if isinstance(size, int):
        return Dim.fixed(size)
    symbol = size.node.expr
    bounds = program.range_constraints[symbol]
    low, high = int(bounds.lower), int(min(bounds.upper, 1 << 16))
    return Dim(str(symbol), low, min(max(low, int(size.node.hint or low)), high), high)


def _spec(spec: InputSpec, shapes: Mapping[str, TensorSpec], ranges: Mapping[str, Dim]) -> TensorSpec:
    """Return the catalogue's input with the sizes the user gave."""
    preprocess = asdict(spec.preprocess) if spec.preprocess else None
    cloud = asdict(spec.cloud) if spec.cloud else None
    if spec.name in shapes:
        given = shapes[spec.name]
        if len(given.dims) != len(spec.dims):
            raise UsageError("EA0111", f"--input {spec.name}: needs {len(spec.dims)} sizes, got {len(given.dims)}")
        dims = list(given.dims)
    else:
        dims = [Dim.fixed(size) for size in spec.dims]
        for name, dim in ranges.items():
            if name.lower() not in _AXES:
                raise UsageError("EA0111", f"--dim {name}: no such size", hints=["batch, height or width"])
            dims[_AXES[name.lower()]] = dim
    return TensorSpec(spec.name, spec.dtype, tuple(dims), preprocess, cloud)


def _with_capacity(spec: TensorSpec, capacity: Capacity) -> TensorSpec:
    """Return the input of a cloud with its sizes; other inputs stay."""
    if spec.cloud is None:
        return spec
    cloud = {**spec.cloud, "voxels": list(capacity.voxels), "sets": [list(pair) for pair in capacity.sets]}
    return replace(spec, dims=(Dim.fixed(capacity.points), *spec.dims[1:]), cloud=cloud)


def _refuse_unknown(shapes: Mapping[str, TensorSpec], names: Sequence[str]) -> None:
    for name in shapes:
        if name not in names:
            raise UsageError("EA0111", f"--input {name}: no such input; inputs are {', '.join(names)}")


def _read_input(text: str, ranges: Mapping[str, Dim]) -> tuple[str, TensorSpec]:
    match = _INPUT.fullmatch(text.replace(" ", ""))
    if not match:
        raise UsageError("EA0111", f"--input {text}: not NAME=1x3x224x224")
    dims = []
    for size in match["dims"].split("x"):
        if not size.isdigit() and size not in ranges:
            raise UsageError("EA0111", f"--input {text}: {size} has no range", hints=[f"--dim {size}=1:8"])
        dims.append(Dim.fixed(int(size)) if size.isdigit() else ranges[size])
    return match["name"], TensorSpec(match["name"], match["dtype"] or "float32", tuple(dims))


def _read_dim(text: str) -> Dim:
    match = _DIM.fullmatch(text)
    if not match:
        raise UsageError("EA0111", f"--dim {text}: not NAME=min:max or NAME=min:max:opt")
    low, high = int(match["min"]), int(match["max"])
    best = int(match["opt"] or low)
    if not 1 <= low <= best <= high:
        raise UsageError("EA0111", f"--dim {text}: wants 1 <= min <= opt <= max")
    if low == high:
        raise UsageError("EA0111", f"--dim {text}: one size only; write it into --input")
    return Dim(match["name"], low, best, high)
