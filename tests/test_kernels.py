"""Triton kernels without a GPU: interpreted against the reference, then compiled, stripped and assembled per board."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgeattn.aot import compile_kernel, grid_of, resolve_constants, strip_hidden_parameters, work_of
from edgeattn.errors import BuildError, UnsupportedError
from edgeattn.op import OPS
from edgeattn.target import TARGETS, get_target

pytest.importorskip("triton", reason="no Triton for this platform")

WITH_KERNEL = [op for op in OPS if op.triton]
CASES = [(op, case) for op in WITH_KERNEL for case in op.cases]
each_case = pytest.mark.parametrize(
    ("op", "case"), CASES, ids=[f"{op.name}-{i}" for op in WITH_KERNEL for i, _ in enumerate(op.cases)]
)
each_op = pytest.mark.parametrize("op", WITH_KERNEL, ids=[op.name for op in WITH_KERNEL])


def specialisations(op):
    """Return the model shapes, the first case for want of them, that differ in a constant of the kernel."""
    shapes = op.shapes or op.cases[:1]
    return list({str(resolve_constants(op.triton, case)): case for case in shapes}.values())


SHAPES = [(op, case) for op in WITH_KERNEL for case in specialisations(op)]
each_shape = pytest.mark.parametrize(
    ("op", "case"), SHAPES, ids=[f"{op.name}-{i}" for op in WITH_KERNEL for i, _ in enumerate(specialisations(op))]
)
boards = pytest.mark.parametrize("board", ["orin", "thor"])


def compiled(op, board, dtype="float16", case=None):
    dims, attributes = op.split_case(case or (op.shapes or op.cases)[0])
    return compile_kernel(op, dims, attributes, dtype, get_target(board))


INTERPRET = """
import sys, torch
from edgeattn.op import OPS
from edgeattn.testing import check_kernel
op = OPS.get(sys.argv[1])
for case in op.cases:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_kernel(op, case, dtype)
        print("checked", dtype)
"""


@each_op
def test_interpreter_agrees_with_the_reference(op):
    """In a process of its own: Triton decides at import whether its library functions are interpreted."""
    command = [sys.executable, "-c", INTERPRET, op.name]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checked") == 3 * len(op.cases)


def test_interpreter_check_can_fail():
    """A kernel whose grid leaves out the last block is caught by the NaN it leaves."""
    broken = INTERPRET.replace(
        "for case", "op.kernel(grid='1', **op.triton.constants)(op.triton.function)\nfor case", 1
    )
    command = [sys.executable, "-c", broken, "single_head_attention"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "AssertionError" in done.stderr


# Small tiles, so that a short sequence has as many as a long one would.
SPANS = """
import dataclasses, torch
from edgeattn.op import OPS
from edgeattn.testing import check_kernel
op = OPS.get("selective_scan")
op.triton = dataclasses.replace(op.triton, constants={**op.triton.constants, "BL": 16, "C": 2, "T": 2})
for k, s, l in ((2, 1, 100), (3, 3, 49)):  # 7 and 4 tiles in 2 spans
    case = dict(b=1, j=1, k=k, d=3, s=s, l=l, directions=[1, 0, 1][:k], delta_softplus=1)
    check_kernel(op, case, torch.float32)
"""


def test_scan_over_several_tiles():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SPANS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


TWICE = """
from __future__ import annotations
import torch
import triton.language as tl
from edgeattn.op import Op
from edgeattn.testing import check_kernel

op = Op("test_twice", "(x[n]) -> (y[n])")


@op.reference
def reference(x):
    return x.clone()


@op.kernel(grid="2")
def kernel(x, y, n: tl.constexpr):
    places = tl.arange(0, 16)
    tl.store(y + places, tl.load(x + places), mask=places < n)


check_kernel(op, {"n": 16}, torch.float32)
"""


def test_interpreter_check_sees_an_element_written_twice(tmp_path):
    script = tmp_path / "twice.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    errors = {}
    for grid in ("1", "2"):
        script.write_text(TWICE.replace('grid="2"', f'grid="{grid}"'))
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
        errors[grid] = done.stderr
    assert errors["1"] == ""
    assert "test_twice: writes an element twice" in errors["2"]


@each_op
@boards
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_compiles_for_the_board(op, board, dtype):
    pack, target = compiled(op, board, dtype), get_target(board)
    assert pack.cubin[:4] == b"\x7fELF"
    assert f".version {target.ptx // 10}.{target.ptx % 10}" in pack.ptx
    assert f".target sm_{target.kernel_sm}" in pack.ptx
    assert pack.shared <= 48 * 1024
    assert pack.spills == 0
    wanted = [tensor.name for tensor in op.signature.inputs] + list(pack.integers)
    assert list(pack.arguments) == wanted + [tensor.name for tensor in op.signature.outputs]
    declared = re.search(r"\.entry \w+\((.*?)\n\)", pack.ptx, re.DOTALL)[1]
    assert declared.count(".param") == len(pack.arguments)


@each_op
@pytest.mark.parametrize("name", [target.name for target in TARGETS.values() if target.sm])
def test_compiles_for_every_target(op, name):
    pack = compiled(op, name)
    assert pack.cubin[:4] == b"\x7fELF"
    assert pack.sm == get_target(name).kernel_sm


@each_shape
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_fits_at_model_shapes(op, case, dtype):
    pack = compiled(op, "orin", dtype, case)
    assert pack.spills == 0
    assert 0 < pack.registers <= 255
    assert pack.shared <= 48 * 1024


@pytest.mark.slow
@each_shape
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_fits_at_model_shapes_on_every_target(op, case, dtype):
    packs = [compiled(op, target.name, dtype, case) for target in TARGETS.values() if target.sm]
    assert {pack.target: pack.spills for pack in packs if pack.spills} == {}


def test_spills_are_counted():
    op = OPS.get("single_head_attention")
    good = op.triton
    try:
        op.triton = replace(good, num_warps=1, constants={**good.constants, "BN": 64, "BE": 64})
        pack = compiled(op, "orin")
    finally:
        op.triton = good
    assert pack.spills > 0
    assert pack.to_record()["spills"] == pack.spills


def test_work_of_a_launch():
    op = OPS.get("single_head_attention")
    case = dict(b=3, d=16, n=49, m=40, e=48, scale=0.25)
    elements = 3 * (16 * 49 + 16 * 40 + 48 * 40 + 48 * 49)
    assert work_of(op, case, "float16") == (2 * elements, 2 * 3 * 49 * 40 * (16 + 48))
    assert work_of(op, case, "float")[0] == 4 * elements


@each_shape
def test_work_is_counted_where_models_use_the_op(op, case):
    moved, _ = work_of(op, case, "float16")
    assert moved > 0


@each_op
def test_record_is_the_same_twice(op, tmp_path, monkeypatch):
    """Compiled from nothing both times: with an empty cache each."""
    records = []
    for folder in ("first", "second"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        records.append(compiled(op, "orin").to_record())
        assert list((tmp_path / folder).iterdir())
    assert records[0] == records[1]
    assert len(records[0]["sha256"]["cubin"]) == 64
    json.dumps(records[0])


@each_op
@boards
def test_code_names_no_file_of_this_machine(op, board):
    pack = compiled(op, board)
    folder = str(Path(op.triton.function.__code__.co_filename).parent)
    assert folder.encode() not in pack.ptx.encode() + pack.cubin
    assert ".file" not in pack.ptx
    assert ".debug" not in pack.ptx


@each_case
def test_launch_expressions_cover_every_output(op, case):
    """The grid evaluated from text is the one the interpreter run used: its outputs had no gap."""
    dims, attributes = op.split_case(case)
    values = {**dims, **attributes, **resolve_constants(op.triton, {**dims, **attributes})}
    assert all(size >= 1 for size in grid_of(op.triton.grid, values))


PTX = ".visible .entry kernel(\n\t.param .u64 kernel_param_0,\n\t.param .u64 kernel_param_1\n)\n{ %s }"


def test_hidden_parameter_in_use_is_refused():
    kept = strip_hidden_parameters(PTX % "ld.param.b64 %rd1, [kernel_param_0];", 1)
    assert "kernel_param_1" not in kept
    with pytest.raises(BuildError, match="EA0503"):
        strip_hidden_parameters(PTX % "ld.param.b64 %rd1, [kernel_param_1];", 1)
    with pytest.raises(BuildError, match="EA0502"):
        strip_hidden_parameters(PTX % "", 3)


def test_grid_with_commas_inside_calls():
    assert grid_of("b, cdiv(n, BN), 1", {"b": 2, "n": 49, "BN": 32}) == (2, 2, 1)


def test_op_without_kernel_is_refused():
    op = next(op for op in OPS if op.triton is None)
    with pytest.raises(UnsupportedError, match=f"EA0501.*{op.name}"):
        compiled(op, "orin")


def test_kernel_that_does_not_compile_names_op_and_board():
    def broken(q, k, v, n, m, out):
        undefined_name(q)  # noqa: F821

    op = OPS.get("single_head_attention")
    good = op.triton
    try:
        op.kernel(grid="1")(broken)
        with pytest.raises(BuildError, match=r"EA0502.*single_head_attention.*orin"):
            compiled(op, "orin")
    finally:
        op.triton = good
