"""The kernels compile for GPUs that are not here, and read rows in the widest pieces.

The interpreter forgives what the compiler does not. Compiling needs Triton, but no device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra kvrag[triton] is not installed")

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvrag_kernels.quantise import kernel as quantise
from kvrag_kernels.segment_attention import kernel as segment

SIZES = dict(G=4, D=128, DV=128, DP=128, DVP=128, R=64, START=0, INTERLEAVED=False, ROTATED=True)
ATTEND = dict(SIZES, SOFTCAP=False, GROUPED=False, MASKED=False, PAGED=False, FORM=0, VALUE_WIDTH=32,
              ALIGNED=8, SP=32, BM=16, BN=64)
ROTATED = {k: v for k, v in SIZES.items() if k in ("D", "R", "START", "INTERLEAVED", "ROTATED")}
BOTH = {k: v for k, v in SIZES.items() if k != "G"}
VARIANTS = {
    "attend": (segment.attend_kernel, ATTEND),
    "attend everything": (segment.attend_kernel, dict(ATTEND, BM=64, SOFTCAP=True, GROUPED=True, MASKED=True,
                                                      PAGED=True)),
    # Numbers of one are compiled in, as for models with a single key head.
    "attend one": (segment.attend_kernel, dict(ATTEND, SP=1, num_queries=1, kv_heads=1, num_segments=1)),
    "attend int4": (segment.attend_kernel, dict(ATTEND, FORM=3)),
    "attend fp8": (segment.attend_kernel, dict(ATTEND, FORM=1)),
    "merge": (segment.merge_kernel, dict(G=4, DV=128, DVP=128, HAS_SINKS=True, GROUPED=True, SP=32, PP=64,
                                         PB=32, JB=8, RB=1, BN=64)),
    "dequantise": (quantise.dequantise_kernel, dict(BOTH, FORM=2, VALUE_WIDTH=32, BN=32)),
    "largest": (quantise.largest_kernel, dict(ROTATED, DP=128, BN=32)),
    "fp8": (quantise.fp8_kernel, dict(BOTH, BN=32)),
    "keys": (quantise.keys_kernel, dict(ROTATED, CP=64, FORM=3, BITS=4, GROUP=32)),
    "values": (quantise.values_kernel, dict(DV=128, W=32, GP=4, WP=16, FORM=3, BITS=4, BN=16)),
}
POINTERS = dict(Q="bf16", KEYS="bf16", VALUES="bf16", TABLE="i64", LENGTHS="i32", MERGED="bf16",
                OUT_KEYS="bf16", OUT_VALUES="bf16", KEY_REST="bf16", REST="bf16", KEY_ZERO="fp16",
                VALUE_ZERO="fp16", ZERO="fp16", SCALE="fp16")
BYTES = {"dequantise": ("KEYS", "VALUES"), "fp8": ("OUT_KEYS", "OUT_VALUES"), "keys": ("OUT",),
         "values": ("OUT",)}
OTHERS = {("dequantise", "KEY_SCALE"): "fp16", ("dequantise", "VALUE_SCALE"): "fp16"}
OTHERS |= {(name, argument): "u8" for name, arguments in BYTES.items() for argument in arguments}
FLOATS = ("factor", "group_factor", "softcap", "group_power")

def source(name):
    function, constants = VARIANTS[name]
    types, hints = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.isupper():
            kind = OTHERS.get((name, argument)) or POINTERS.get(argument, "fp32")
            types[argument], hints[(i,)] = "*" + kind, [["tt.divisibility", 16]]
        else:
            types[argument] = "fp32" if argument in FLOATS else "i32"
            if argument.startswith("query_"):
                hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, types, constants, hints)

target = GPUTarget("cuda", int(sys.argv[1]), 32)
for name in sys.argv[2:] or VARIANTS:
    made = triton.compile(source(name), target=target, options={"num_stages": 3})
    code = made.asm["ptx"]
    if name in ("attend", "attend one"):
        assert "cp.async.cg" in code, "rows are not read in pieces of 16 bytes"
        assert "mma" in code
    assert made.metadata.shared <= 99 * 1024 or name == "attend everything", (name, made.metadata.shared)
    print(name, made.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("80", "attend", "merge"), ("90",)], ids=["80", "90"])
def test_compiles_for_devices_that_are_not_here(wanted: tuple[str, ...]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *wanted],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(wanted[1:] or range(11))


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.slow
def test_launches_fit_their_devices() -> None:
    """What is planned to run beside each other fits, and no kernel lives on spilled registers."""
    paths = [str(BENCHMARKS), *(p for p in sys.path if p)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels_parts" / "compiling.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_DEFAULT_FP_FUSION": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["device"] for row in rows} == {"A100", "H100"}
    for row in rows:
        assert row["programs at once"] >= row.get("planned at once", 1), row
        assert row["spilled bytes"] <= 512, row
        assert row["spilled bytes"] == 0 or not row["what"].startswith("decode, Llama"), row
    under_way = [row["KiB under way"] for row in rows if "KiB under way" in row]
    assert len(under_way) == 24
    assert min(under_way) > 20  # behind which an H100's way to its memory hides
