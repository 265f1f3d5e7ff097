"""The kernels of strides and memories compile for GPUs that are not there, and read in the widest pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Runs in a process of its own, where Triton compiles instead of interpreting.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvrag_kernels.cascade_update.kernel import play_level
from kvrag_kernels.move_rows.kernel import gather_rows, scatter_rows
from kvrag_kernels.strided_prefill.kernel import attend, sum_columns, turn_rows

half, real, double, whole, numbers = "*bf16", "*fp32", "*fp64", "*i64", {"scale": "fp32", "cap": "fp32"}
rotation = {"D": 32, "DP": 32, "PAIRS": 16, "START": 0, "INTERLEAVED": False}
tiles = {"ALIGN": 8, "ROWS": 64, "COLUMNS": 32, "CAPPED": True, "GROUPS": 3}
kernels = [
    (attend, {"query": half, "cos": real, "sin": real, "keys": half, "values": half, "table": whole,
              "sinks": real, "out": half, "lse": real, "part_lse": real, **numbers},
     {**rotation, **tiles, "DV": 32, "DVP": 32, "SINKS": True}),
    (turn_rows, {"query": half, "cos": real, "sin": real, "turned": half}, {**rotation, "ROWS": 32}),
    (sum_columns, {"queries": half, "bias": real, "keys": half, "table": whole, "blocks": "*i32",
                   "sums": real, **numbers}, {**tiles, "D": 32, "DP": 32}),
    (gather_rows, {"base": half, "table": whole, "sources": whole, "slots": whole, "frequencies": double,
                   "taken": half}, {**rotation, "ALIGN": 8, "ROWS": 32}),
    (scatter_rows, {"base": half, "table": whole, "slots": whole, "taken": half},
     {"D": 32, "DP": 32, "ALIGN": 8, "ROWS": 32}),
    *((play_level, {"residents": whole, "firsts": whole, "places": whole, "scores": real, "kept": whole,
                    "before_sources": whole, "before_scores": real, "best_sources": whole,
                    "best_scores": real},
       {"IS_FIRST": is_first, "SEGMENTS": 16, "HEADS": 16}) for is_first in (True, False)),
]
STRIDES = ("q_batch", "q_head", "q_row", "q_segment")  # of query rows, which the launcher says of itself
for kernel, types, constants in kernels:
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    known = [n for n in kernel.arg_names if types.get(n, "")[:1] == "*" or n in STRIDES]
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in known}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    # Rows are read in pieces of 16 bytes, and not number by number; but Triton 3.4 reads a program's own
    # columns so, which happens once for all queries.
    narrow = kernel is sum_columns and triton.__version__.startswith("3.4.")
    assert narrow or "ld.global.b16" not in compiled.asm["ptx"], kernel.__name__
    assert kernel not in (attend, sum_columns) or "cp.async.cg" in compiled.asm["ptx"], kernel.__name__
    assert compiled.metadata.shared <= 99 * 1024
    print(kernel.__name__, len(compiled.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    roots = [root for root in sys.path if root]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(roots),
    }
    program = tmp_path / "program.py"  # Triton reads the sources of its functions, not this one's
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7
