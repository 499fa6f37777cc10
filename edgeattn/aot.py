"""Ahead-of-time compilation: a Triton kernel becomes PTX and a cubin for a board, on a machine without any GPU.

The PTX carries the ISA version the board's driver takes, and exactly the parameters a plugin passes: Triton's two
hidden scratch pointers are removed, and the result is assembled again as a check.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeattn import expr
from edgeattn.errors import BuildError, UnsupportedError
from edgeattn.op import Kernel, Op
from edgeattn.packages import require
from edgeattn.target import Target

_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
_ITEM_SIZES = {"float": 4, "float16": 2, "bfloat16": 2}
# What a plugin launches is one block grid with pointers and int32: nothing that needs memory or a cluster of its own.
_FORBIDDEN = {
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "tmem_size": 0,
    "num_ctas": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}
_SHARED_LIMIT = 48 * 1024
_ENTRY = re.compile(r"(\.visible \.entry \w+\()(.*?)(\n\))", re.DOTALL)
_PARAMETER = re.compile(r"(\w+_param_\d+)")
_THREADS = re.compile(r"(\.(?:req|max)ntid \d+[^\n]*)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")


@dataclass(frozen=True)
class Pack:
    """A compiled kernel with everything a launcher needs; `arguments` lists pointers and int32 values in launch order.

    Grid and int32 values are expressions over the dims of the op; `block` is threads per block, `shared` bytes of
    dynamic shared memory, `ptx_isa` the PTX version times ten; `registers` are per thread, and `spills` the bytes that
    each thread stores and loads because they were not enough.
    """

    op: str
    key: str
    target: str
    dtype: str
    entry: str
    sm: int
    ptx_isa: int
    arguments: tuple[str, ...]
    integers: tuple[str, ...]
    grid: str
    constants: dict[str, Any]
    block: int
    shared: int
    registers: int
    spills: int
    ptx: str
    cubin: bytes

    def to_record(self) -> dict[str, Any]:
        """Return the JSON record: the same for the same kernel, code given by its hash."""
        record = {name: value for name, value in asdict(self).items() if name not in ("ptx", "cubin")}
        hashes = {"ptx": _sha256(self.ptx.encode()), "cubin": _sha256(self.cubin)}
        return {**record, "schema": "edgeattn.kernel/1", "sha256": hashes}

    def launch_grid(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the grid for the dims of one call."""
        return grid_of(self.grid, {**dims, **self.constants})


def compile_kernel(op: Op, dims: Mapping[str, int], attributes: Mapping[str, Any], dtype: str, target: Target) -> Pack:
    """Compile the Triton kernel of `op` for `target`; `dtype` is "float", "float16" or "bfloat16".

    Dims that become constants of the kernel are taken from `dims`. Raises EA0501 for an op without a kernel, EA0502
    when it does not compile and EA0503 when it needs what a plugin cannot give.
    """
    if op.triton is None:
        raise UnsupportedError("EA0501", f"{op.name}: has no kernel; it runs as its body")
    kernel = op.triton
    triton = require("triton")
    constants = resolve_constants(kernel, {**attributes, **dims, "itemsize": _ITEM_SIZES[dtype]})
    names = list(triton.JITFunction(kernel.function).arg_names)
    compiled = _compile(triton, op, kernel, names, constants, dtype, target)
    _refuse_unlaunchable(op, compiled.metadata)
    arguments = tuple(name for name in names if name not in constants)
    pointers = {tensor.name for tensor in (*op.signature.inputs, *op.signature.outputs)}
    ptx = strip_hidden_parameters(compiled.asm["ptx"], len(arguments))
    ptx, cubin, registers, spills = _assemble_without_spills(ptx, target.sm)
    digest = hashlib.sha256(f"{sorted(constants.items())} {dtype}".encode()).hexdigest()[:8]
    return Pack(
        op=op.name,
        key=digest,
        target=target.name,
        dtype=dtype,
        entry=compiled.metadata.name,
        sm=target.kernel_sm,
        ptx_isa=target.ptx,
        arguments=arguments,
        integers=tuple(name for name in arguments if name not in pointers),
        grid=kernel.grid,
        constants=constants,
        block=32 * compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        ptx=ptx,
        cubin=cubin,
    )


def resolve_constants(kernel: Kernel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every constant parameter: an attribute, a dim, a number or a function of the values.

    Besides dims and attributes such a function finds `itemsize`, the bytes of the op's type T: 2 unless given.
    """
    values = {"itemsize": 2, **values}
    found: dict[str, Any] = {
        name: value(values) if callable(value) else value for name, value in kernel.constants.items()
    }
    for name in kernel.constant_names:
        found.setdefault(name, values.get(name))
    return found


def work_of(op: Op, case: Mapping[str, Any], dtype: str) -> tuple[int, int]:
    """Return the bytes one launch has to move, every input and output once, and the floating-point operations it needs.

    Raises EA0501 for an op without a kernel.
    """
    if op.triton is None:
        raise UnsupportedError("EA0501", f"{op.name}: has no kernel; it runs as its body")
    own = _ITEM_SIZES[dtype]
    values = {**case, **resolve_constants(op.triton, {**case, "itemsize": own})}
    moved = 0
    for tensor in (*op.signature.inputs, *op.signature.outputs):
        size = own if tensor.dtype == "T" else 4
        moved += size * math.prod(int(expr.evaluate(dim, values)) for dim in tensor.dims)
    return moved, int(expr.evaluate(op.triton.flops or "0", values))


def grid_of(text: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the grid that the comma-separated expressions in `text` give; commas inside parentheses do not count."""
    parts = re.split(r",\s*(?![^()]*\))", text)
    return tuple(int(expr.evaluate(part, values)) for part in parts)


def strip_hidden_parameters(ptx: str, count: int) -> str:
    """Return `ptx` with only the first `count` parameters of its kernel.

    Raises EA0503 when one of the others is used, or when the kernel has fewer than `count`.
    """
    match = _ENTRY.search(ptx)
    declared = [part.strip() for part in match[2].split(",")] if match else []
    if match is None or len(declared) < count:
        raise BuildError("EA0502", f"the kernel declares {len(declared)} parameters, {count} are passed")
    body = ptx[match.end() :]
    for part in declared[count:]:
        name = _PARAMETER.search(part)
        if name is None or re.search(rf"\b{name[1]}\b", body):
            raise BuildError("EA0503", f"hidden parameter is used: {part}")
    kept = ",".join(f"\n\t{part}" for part in declared[:count])
    return ptx[: match.start()] + match[1] + kept + match[3] + body


def assemble(ptx: str, sm: int) -> tuple[bytes, int, int]:
    """Return the cubin of `ptx` for `sm` (times ten), its registers per thread and its bytes of spills.

    The assembler is the one Triton carries or the one on PATH.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        # The assembler of Triton 3.6 is older than sm_110; that of an installed CUDA 13 is not.
        for assembler in filter(None, (get_ptxas(sm).path, shutil.which("ptxas"))):
            command = [assembler, "-v", f"-arch={_architecture(ptx, sm)}", str(source), "-o", str(result)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                used = _REGISTERS.search(done.stderr)
                spills = sum(int(count) for count in _SPILLS.findall(done.stderr))
                return result.read_bytes(), int(used[1]) if used else 0, spills
        raise BuildError("EA0502", f"ptxas refuses the kernel: {done.stderr.strip().splitlines()[-1][:300]}")


def _assemble_without_spills(ptx: str, sm: int) -> tuple[str, bytes, int, int]:
    """Return `ptx` and what `assemble` gives, with every register allowed to a kernel that spills otherwise.

    Left alone, ptxas spills a few bytes to fit more blocks on a multiprocessor.
    """
    cubin, registers, spills = assemble(ptx, sm)
    if spills:
        roomy = _THREADS.sub(r"\1\n.maxnreg 255", ptx, count=1)
        cubin, registers, spills = assemble(roomy, sm)
        return roomy, cubin, registers, spills
    return ptx, cubin, registers, spills


def _architecture(ptx: str, sm: int) -> str:
    """Return the architecture to assemble for; from sm_90 on Triton's own PTX is bound to a variant such as sm_90a."""
    match = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    return match[1] if match and int(match[2]) == sm else f"sm_{sm}"


def _compile(
    triton: Any, op: Op, kernel: Kernel, names: list[str], constants: Mapping[str, Any], dtype: str, target: Target
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tensors = {tensor.name: tensor for tensor in (*op.signature.inputs, *op.signature.outputs)}
    types = {}
    for name in names:
        if name in tensors:
            types[name] = "*" + _TYPES[dtype if tensors[name].dtype == "T" else tensors[name].dtype]
        else:
            types[name] = "constexpr" if name in constants else "i32"
    # Engines align tensors to 256 bytes; 16 is what vector loads need.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in tensors}
    source = ASTSource(triton.JITFunction(kernel.function), types, constexprs=dict(constants), attrs=aligned)
    options = {
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
        "ptx_version": target.ptx,
        "enable_fp_fusion": True,
    }
    try:
        # Line information names files of this machine, and is two thirds of a cubin.
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            return triton.compile(source, target=GPUTarget("cuda", target.kernel_sm, 32), options=options)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BuildError("EA0502", f"{op.name}: does not compile for {target.name}: {first.strip()[:300]}") from error


def _refuse_unlaunchable(op: Op, metadata: Any) -> None:
    for name, allowed in _FORBIDDEN.items():
        if getattr(metadata, name, allowed) not in (allowed, None):
            raise BuildError("EA0503", f"{op.name}: needs {name} = {getattr(metadata, name)}, a plugin gives {allowed}")
    if metadata.shared > _SHARED_LIMIT:
        raise BuildError("EA0503", f"{op.name}: needs {metadata.shared} bytes of shared memory, limit {_SHARED_LIMIT}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
