"""Every kernel as a fraction of what the device can do, and against PyTorch's own operators; all in one run.

    python benchmarks/kernels.py --json docs/data/kernels-cpu.json
    python benchmarks/kernels.py --only segment            # one part; the others stay as they were
    python benchmarks/kernels.py --smoke                   # seconds, for continuous integration

On a GPU the kernels are measured; without one the paths for the CPU are, where only ratios mean something.
A part is a module in `kernels_parts` with `NAME` and `run(device, small)`, which gives rows of a table; what
it found is written down before the next one begins. `benchmarks/on_gpu.py` runs them all where a GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from kernels_parts.clock import is_alone

if not torch.cuda.is_available():  # read when the kernels are imported, so before any of them is
    os.environ.setdefault("TRITON_INTERPRET", "1")

Row = dict[str, Any]


def parts() -> dict[str, ModuleType]:
    """All parts by name, the limits first."""
    folder = Path(__file__).parent / "kernels_parts"
    found = [import_module(f"kernels_parts.{module.name}") for module in iter_modules([str(folder)])]
    named = {module.NAME: module for module in found if hasattr(module, "NAME")}
    return dict(sorted(named.items(), key=lambda item: (item[0] != "limits", item[0])))


def conditions(device: torch.device, small: bool) -> Row:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "clock": "process" if is_alone(device) else "wall",
        "load": round(os.getloadavg()[0], 1),
        "small": small,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _triton() -> str | None:
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return None


def measure(
    device: torch.device, *, small: bool, only: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the parts.

    Args:
        device: to measure.
        small: smallest form.
        only: names of parts; None for all.

    Yields:
        Name, conditions and rows of each part, and the seconds that it took.

    Raises:
        SystemExit: there is no part of such a name.
    """
    known = parts()
    if unknown := set(only or ()) - set(known):
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    for name, part in known.items():
        if only is None or name in only:
            started = time.perf_counter()
            rows = part.run(device, small)
            took = round(time.perf_counter() - started, 1)
            yield name, {"conditions": conditions(device, small), "seconds": took, "rows": rows}


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; columns in the order in which they first appear."""
    if not rows:
        return "Nothing on this device."
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="parts to measure; others stay in --json as they were")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="little of everything, once")
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name, part in measure(torch.device(args.device), small=args.smoke, only=args.only):
        found[name] = part
        print(f"\n## {name}\n\n{table(part['rows'])}", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
