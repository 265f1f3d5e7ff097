"""Builds, checks and measures everything that needs a GPU, one step after the other, and writes it all down.

    python benchmarks/on_gpu.py --into results             # on the machine with the GPU
    python benchmarks/on_gpu.py --json results/gpu.json     # the same, and everything in one file
    python benchmarks/on_gpu.py --smoke                     # anywhere: the smallest form of what runs here

Needs torch, triton, transformers and, for the tests, pytest, hypothesis and numpy; neither databases nor
frameworks. The checkout need not be installed. A step that fails is written down, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

# Only what the tests of the kernels need; the project's own settings ask for plugins that are not there.
_PYTEST = """[pytest]
addopts = --import-mode=importlib
markers =
    gpu: needs a CUDA device
    slow: more than ten seconds
    bench: measures speed
"""


_LLAMA = ("--shape", "Llama-3.1-8B")
_PROMPT = ("--documents", "32", "--tokens", "512", "--question", "64")


def environment() -> dict[str, str]:
    """The checkout on the path, kernels compiled instead of interpreted, no hub asked."""
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "HF_HUB_OFFLINE": "1"}
    own["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
    return {**os.environ, **own}


def versions() -> dict[str, Any]:
    """What is measured with."""
    names = ("torch", "triton", "transformers", "pytest", "hypothesis")
    found: dict[str, Any] = {}
    for name in names:
        if find_spec(name) is not None:
            found[name] = __import__(name).__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return found


def steps(into: Path, configuration: Path, *, smoke: bool) -> dict[str, list[str]]:
    """Commands by name, in order; what a step measures it writes to `into` itself."""
    if smoke:
        return {"kernels": ["benchmarks/kernels.py", "--smoke", "--json", str(into / "kernels.json")]}
    tests = ["tests/kernels", "tests/test_replay.py"]
    common = ["--device", "cuda", "--dtype", "bfloat16", "--json"]
    return {
        "tests": [
            "-m",
            "pytest",
            "-c",
            str(configuration),
            "--rootdir",
            str(ROOT),
            "-m",
            "gpu",
            "-q",
            *tests,
        ],
        "kernels": ["benchmarks/kernels.py", "--json", str(into / "kernels.json")],
        "first token": ["benchmarks/ttft.py", *_LLAMA, *_PROMPT, *common, str(into / "ttft.json")],
        "callers": ["benchmarks/batch.py", *_LLAMA, *common, str(into / "batch.json")],
    }


def run(name: str, command: list[str], into: Path, seconds: int) -> dict[str, Any]:
    """Run one step; its output goes to a file and to the terminal."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    started = time.time()
    with (into / f"{name.replace(' ', '-')}.txt").open("w+") as log:
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT,
                check=False, timeout=seconds,
            )  # fmt: skip
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        lines = log.read().splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return {"exit": code, "seconds": round(time.time() - started, 1), "last": lines[-1] if lines else ""}


def main() -> int:
    """Run the steps; 0 if all of them went well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, help="folder for results; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the summary and what every step measured here")
    parser.add_argument("--only", nargs="*", help="names of steps")
    parser.add_argument("--seconds", type=int, default=1800, help="longest time of a step")
    parser.add_argument("--smoke", action="store_true", help="the smallest form, with or without a GPU")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("There is no CUDA device here; --smoke runs what can be run without one.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kvrag-gpu-") as name:
        into = args.into or Path(name)
        into.mkdir(parents=True, exist_ok=True)
        configuration = Path(name) / "pytest.ini"
        configuration.write_text(_PYTEST)
        found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "steps": {}}
        for step, command in steps(into.resolve(), configuration, smoke=args.smoke).items():
            if args.only is None or step in args.only:
                found["steps"][step] = run(step, command, into, args.seconds)
        (into / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
        if args.json:
            measured = {f.stem: json.loads(f.read_text()) for f in into.glob("*.json") if f.stem != "summary"}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found | {"measured": measured}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if all(step["exit"] == 0 for step in found["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
