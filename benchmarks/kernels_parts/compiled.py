"""What Triton's compiler makes of the kernels for GPUs that need not be there: registers, spills, memory.

Spilled registers and programs that do not fit beside each other make a kernel slow, and both are known
without running it. The kernels are compiled as they would be launched for the models' shapes, in a process of
its own, since here Triton's interpreter may have taken their place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvrag_kernels._backend import has_triton

NAME = "compiled"

_SCRIPT = Path(__file__).with_name("compiling.py")


def run(_device: torch.device, small: bool) -> list[dict[str, Any]]:
    """One row per kernel and capability; nothing without Triton.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    if not has_triton():
        return []
    root = _SCRIPT.parent.parent.parent
    paths = [str(root), str(root / "kernels"), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *(["--small"] if small else [])],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
