"""The PyTorch original as validation needs it: outputs in float32 unrounded, in half precision, and compiled."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from edgeattn.bundle import Bundle
from edgeattn.errors import MissingError
from edgeattn.originals import original
from edgeattn.packages import require
from edgeattn.tensors import to_torch

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Results = dict[str, Array]
GOLDEN_INPUTS, GOLDEN_OUTPUTS = "golden/inputs.npz", "golden/outputs.npz"
_HALF = {"fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One set of inputs, its name in reports, and the outputs PyTorch gave at export where they were recorded."""

    name: str
    feeds: Feeds
    recorded: Results | None = None


def golden(bundle: Bundle) -> Iterator[Sample]:
    """Yield the inputs kept in the bundle with the outputs that PyTorch gave at export, if there are any."""
    if GOLDEN_INPUTS not in bundle.files:
        return
    inputs = bundle.arrays(GOLDEN_INPUTS)
    outputs = bundle.arrays(GOLDEN_OUTPUTS)
    for index in range(len(next(iter(inputs.values())))):
        recorded = {name: values[index] for name, values in outputs.items()}
        yield Sample(f"golden-{index}", {name: values[index] for name, values in inputs.items()}, recorded)


class Original:
    """The PyTorch module of a bundle, called with numpy arrays by name; `precision` other than fp32 is its own copy."""

    def __init__(self, bundle: Bundle, module: Any, dtype: str = "float32") -> None:
        self._torch = require("torch")
        self._bundle = bundle
        self._module = module
        self._dtype = getattr(self._torch, dtype)

    @classmethod
    def load(cls, bundle: Bundle) -> Original:
        """Return the original in float32. Raises EA0201 without torch, EA0906 for a copy without `reference/`."""
        require("torch")
        return cls(bundle, original(bundle))

    def __call__(self, feeds: Feeds) -> Results:
        """Return every output by name, floating ones in float32 (rounded to half only where the module computes so)."""
        with self._torch.inference_mode():
            found = self._module(*(self._tensor(spec.name, feeds[spec.name]) for spec in self._bundle.inputs))
        values = found if isinstance(found, (tuple, list)) else [found]
        values = list(found.values()) if isinstance(found, Mapping) else values
        return {spec.name: self._array(value) for spec, value in zip(self._bundle.outputs, values, strict=True)}

    @property
    def module(self) -> Any:
        """Return the PyTorch module, to watch its parts."""
        return self._module

    def at(self, precision: str) -> Original:
        """Return a copy that computes in `precision` ("fp16", "bf16")."""
        dtype = _HALF[precision]
        if self._bundle.detector is not None:
            return Original(self._bundle, self._stored_as(dtype))
        module = copy.deepcopy(self._module).to(getattr(self._torch, dtype))
        return Original(self._bundle, module, dtype)

    def compiled(self, feeds: Feeds) -> Original:
        """Return the module through `torch.compile`, already compiled for these inputs. Raises EA0211."""
        compiled = Original(self._bundle, self._torch.compile(self._module))
        try:
            compiled(feeds)
        except Exception as error:
            # Inductor raises whatever the compiler, the linker or the tracer raised.
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise MissingError("EA0211", "torch.compile does not work here", why=why[:200]) from error
        return compiled

    def _stored_as(self, dtype: str) -> Any:
        """Return the module of a detector rounded to `dtype`: its coordinates stay float32."""
        from edgeattn.model import MODELS
        from edgeattn.rounding import StoredAs

        keep = MODELS.get(str(self._bundle.manifest["model"]["variant"])).keep_fp32
        return StoredAs(self._module, getattr(self._torch, dtype), keep)

    def _tensor(self, name: str, array: Array) -> Any:
        tensor = to_torch(name, array, "cpu")
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _array(self, tensor: Any) -> Array:
        value: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return value
