"""PyTorch as if it stored in half precision: float32 arithmetic, and every weight and result rounded.

Detectors are measured against this instead of a half-precision copy: their convolutions take minutes in float16 on a
CPU, and coordinates of a cloud may not be rounded at all.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class StoredAs(nn.Module):
    """A float32 copy of `module` that rounds weights and the result of every operation to `dtype`.

    Inside modules whose path matches a pattern of `keep`, nothing is rounded.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self._mode = _Rounding(dtype)
        kept = [part for name, part in self.module.named_modules() if _matches(name, keep)]
        for part in kept:
            part.register_forward_pre_hook(lambda *_: self._mode.pause(1))
            part.register_forward_hook(lambda *_: self._mode.pause(-1), always_call=True)
        exact = {id(value) for part in kept for value in (*part.parameters(), *part.buffers())}
        with torch.no_grad():
            for value in (*self.module.parameters(), *self.module.buffers()):
                if id(value) not in exact and value.dtype == torch.float32:
                    value.copy_(value.to(dtype))

    def forward(self, *inputs: Tensor) -> Any:
        """Run the module; inputs are taken as they are."""
        with self._mode:
            return self.module(*inputs)


class _Rounding(TorchDispatchMode):
    """Rounds what operations return, but for views, which round nothing and share memory with what they show."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._paused = 0

    def pause(self, change: int) -> None:
        self._paused += change

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if self._paused:
            return found
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            return tree_map_only(Tensor, self._round_in_place, found)
        shared = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        return tree_map_only(Tensor, lambda value: self._rounded(value, shared), found)

    def _round_in_place(self, value: Tensor) -> Tensor:
        return value.copy_(value.to(self._dtype)) if value.dtype == torch.float32 else value

    def _rounded(self, value: Tensor, shared: set[int]) -> Tensor:
        if value.dtype != torch.float32 or value.untyped_storage().data_ptr() in shared:
            return value
        return value.to(self._dtype).to(torch.float32)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
