"""The store on disk against dd of the same bytes, torch.save, safetensors and memory; all in one run.

    python benchmarks/store.py --json docs/data/store.json
    python benchmarks/store.py --smoke              # seconds, for continuous integration

Sides take turns, so that whatever else the machine does disturbs all of them alike; medians are given, and
the least of each beside them. The folder decides which disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from store_parts import answering, codecs, many, page, reading, writing
from store_parts.corpus import SMOKE, Size, make
from ttft import processor

from kvrag.model import quiet


def conditions(args: argparse.Namespace, size: Size, folder: Path) -> dict[str, object]:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "repeat": args.repeat,
        **asdict(size),
    }


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on, "unknown" where nobody says."""
    best = ("", "unknown")
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return best[1]
    for line in lines:
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = point, kind
    return best[1]


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: that of temporary files"
    )
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--entries", type=int, default=100_000, help="of the look-up part")
    parser.add_argument("--questions", type=int, default=16, help="of the codec part")
    parser.add_argument("--only", nargs="*", help="parts to measure; the others are taken from --json")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="little of everything, once")
    args = parser.parse_args()
    quiet()
    size = SMOKE if args.smoke else Size()
    if args.smoke:
        args.repeat, args.entries, args.questions = 2, 200, 1
    kept = json.loads(args.json.read_text()) if args.only and args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="kvrag-store-", dir=args.folder) as name:
        folder = Path(name)
        entries = make(size)
        parts = {
            "reading": lambda: reading.measure(_made(folder / "r"), entries, args.repeat),
            "writing": lambda: writing.measure(_made(folder / "w"), entries, args.repeat),
            "answering": lambda: answering.measure(_made(folder / "a"), args.repeat, smoke=args.smoke),
            "codecs": lambda: codecs.measure(args.questions, smoke=args.smoke),
            "many": lambda: many.measure(folder / "m", args.entries),
        }
        found = dict(kept)
        for part, measure in parts.items():
            if args.only is None or part in args.only:
                made = conditions(args, size, folder)
                found[part] = {"conditions": made, **measure()}
    print("\n".join(page.lines(found)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
