"""Compiles kernels as they would be launched, for GPUs that are not here; a program of its own.

Prints a JSON line per kernel. The launcher is given something in a kernel's place that notes its arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia as nvidia
from kernels_parts.forms import local_turn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvrag_kernels import AnyRows, QuantisedRows, RowMask, Rows, Turn
from kvrag_kernels.quantise import Form, quantise
from kvrag_kernels.segment_attention import launch as segment
from kvrag_kernels.strided_prefill import launch as strided
from kvrag_kernels.strided_prefill.types import Scoring

_TOOL = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """What one multiprocessor has, by NVIDIA's programming guide.

    Attributes:
        name: a GPU with this capability.
        capability: ten times the compute capability.
        processors: multiprocessors of that GPU.
        shared: bytes of shared memory, of which every program takes 1 KiB more than it asks for.
        registers: of 32 bits.
    """

    name: str
    capability: int
    processors: int
    shared: int
    registers: int = 65_536


DEVICES = (Device("H100", 90, 132, 228 << 10), Device("A100", 80, 108, 164 << 10))


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it was called with."""

    kernel: Any
    positional: tuple[Any, ...]
    named: dict[str, Any]

    def compiled(self, device: Device) -> Any:
        """Compile it as Triton would at the call: sixteens and ones among the numbers are known."""
        names = self.kernel.arg_names
        values = {**dict(zip(names, self.positional, strict=False)), **self.named}
        options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
        types: dict[str, str] = {}
        known: dict[str, Any] = {}
        hints: dict[tuple[int], list[list[Any]]] = {}
        for i, name in enumerate(names):
            value = values[name]
            if name in self.named or (isinstance(value, int) and value == 1):
                types[name], known[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name], hints[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if abs(value) < 1 << 31 else "i64"
                if value % 16 == 0:
                    hints[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, known, hints)
        return triton.compile(source, target=GPUTarget("cuda", device.capability, 32), options=options)


@contextmanager
def noted(module: Any, *names: str) -> Iterator[list[Launch]]:
    """Let kernels of a module note their calls instead of running."""
    found: list[Launch] = []
    real = {name: getattr(module, name) for name in names}

    class Noting:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, _grid: object) -> Callable[..., None]:
            return lambda *args, **named: found.append(Launch(self._kernel, args, named))

    for name, kernel in real.items():
        setattr(module, name, Noting(kernel))
    try:
        yield found
    finally:
        for name, kernel in real.items():
            setattr(module, name, kernel)


@dataclass(frozen=True, slots=True)
class Case:
    """Attention to segments as a model does it."""

    what: str
    queries: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    form: Form | None = None
    masked: bool = False

    def launches(self, device: Device) -> tuple[list[Launch], int, int]:
        """The two launches, bytes of a row, and programs per multiprocessor that were planned."""
        size, count = 64, 4
        made = [torch.randn(2, self.kv_heads, size, self.dim).bfloat16() for _ in range(count)]
        query = torch.randn(1, self.heads, self.queries, self.dim).bfloat16()
        mask = RowMask(torch.ones(self.queries, size, dtype=torch.bool)) if self.masked else None
        local = local_turn(size, self.dim, query.device)
        rows: list[AnyRows] = [Rows(kv[0][None], kv[1][None], mask=mask) for kv in made]
        num_bytes = 2 * self.dim * 2
        if self.form is not None:
            packed = [quantise(kv[0], kv[1], self.form, local) for kv in made]
            rows = [QuantisedRows(each, local) for each in packed]
            num_bytes = sum(part.nbytes for part in packed[0].tensors) // (size * self.kv_heads)
        angles = torch.zeros(count, self.queries, self.dim // 2)
        chosen = segment.tuning_for(
            query, self.kv_heads, self.dim, 32_768, 32, grouped=False, packed=self.form is not None,
            masked=self.masked, processors=device.processors,
        )  # fmt: skip
        tuning = replace(chosen, merged=1 if chosen.queries == 16 else 8)
        with noted(segment, "attend_kernel", "merge_kernel") as found:
            segment.StaticAttention(query, [rows], [Turn(angles, angles)], scale=1.0, tuning=tuning)(query)
        blocks = -(-self.heads // self.kv_heads * self.queries // tuning.queries)
        planned = -(-tuning.splits * self.kv_heads * blocks // device.processors)
        return found, num_bytes, planned


CASES = (
    Case("decode, Llama-3.1-8B"),
    Case("decode, Qwen2.5-7B", heads=28, kv_heads=4),
    Case("decode, 0.5B", heads=14, kv_heads=2, dim=64),
    Case("decode, heads of 256", heads=8, kv_heads=4, dim=256),
    Case("decode, masks", masked=True),
    Case("decode, fp8", form="fp8"),
    Case("decode, int8", form="int8"),
    Case("decode, int4", form="int4"),
    Case("16 rows", queries=16),
    Case("64 rows", queries=64),
    Case("64 rows, masks", queries=64, masked=True),
    Case("64 rows, int8", queries=64, form="int8"),
)


def strides(dim: int) -> list[Launch]:
    """The launches of a stride, scores included."""
    query, keys = torch.randn(1, 32, 256, dim).bfloat16(), torch.randn(1, 8, 256, dim).bfloat16()
    rows, angles = [Rows(keys, keys), Rows(keys, keys, causal=True)], torch.zeros(2, 256, dim // 2)
    with noted(strided.kernel, "attend", "sum_columns", "turn_rows") as found:
        strided.strided_prefill_triton(
            query, rows, Turn(angles, angles), scale=1.0, scoring=Scoring(torch.ones(256))
        )
    return found


def resources(launch: Launch, device: Device) -> dict[str, Any]:
    """What a program takes, and how many of them a multiprocessor runs at once."""
    made = launch.compiled(device)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [_TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", told)[-1]) for name in ("REG", "STACK"))
    warps, shared = made.metadata.num_warps, made.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    fitting = min(device.registers // (per_warp * warps), device.shared // (shared + 1024), 64 // warps)
    return {
        "device": device.name,
        "kernel": launch.kernel.__name__,
        "warps": warps,
        "stages": made.metadata.num_stages,
        "registers": registers,
        "spilled bytes": stack,
        "shared KiB": shared / 1024,
        "programs at once": fitting,
    }


def main() -> None:
    """Print everything; with `--small` one kernel for one device."""
    is_small = "--small" in sys.argv
    for device in DEVICES[: 1 if is_small else None]:
        for case in CASES[: 1 if is_small else None]:
            launches, num_bytes, planned = case.launches(device)
            for launch in launches[: 1 if case.what != CASES[0].what or is_small else None]:
                row = resources(launch, device)
                if launch.kernel is segment.attend_kernel:
                    tile, stages = launch.named["BN"], launch.named["num_stages"]
                    row |= {"tile": f"{launch.named['BM']} x {tile}", "planned at once": planned}
                    at_once = min(planned, row["programs at once"])
                    row["KiB under way"] = (stages - 1) * tile * num_bytes * at_once / 1024
                print(json.dumps({"what": case.what, **row}), flush=True)
        for dim in () if is_small else (64, 128):
            for launch in strides(dim):
                row = resources(launch, device)
                tile = f"{launch.named['ROWS']} x {launch.named.get('COLUMNS', '')}".removesuffix(" x ")
                print(json.dumps({"what": f"a stride, heads of {dim}", **row, "tile": tile}), flush=True)


if __name__ == "__main__":
    main()
