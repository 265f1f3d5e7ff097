"""Builds, checks and measures everything that needs a GPU, one step after the other, and writes it all down.

    python benchmarks/on_gpu.py --json docs/data/kernels-gpu.json   # on the machine with the GPU
    python benchmarks/on_gpu.py --into results --total 540          # begins nothing after nine minutes
    python benchmarks/on_gpu.py --into results --only tests segment # some of it; the rest stays as it was
    python benchmarks/on_gpu.py --smoke                             # anywhere: the smallest form

What is most worth knowing comes first: whether the kernels are right, then their figures, part by part, each
in a process of its own. What a step has measured is on the disk as soon as it is known, so nothing is lost
if a later one fails or time runs out. The search for better tilings compiles for long and is left out unless
it is named (`--only tuning`).

Needs torch, triton, transformers and, for the tests, pytest, hypothesis and numpy; with pytest-xdist they
compile side by side. Neither databases nor frameworks; the checkout need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
_SIDE_BY_SIDE = "8"  # processes that run tests: most of their time is compiling

_LLAMA = ("--shape", "Llama-3.1-8B")
_PROMPT = ("--documents", "32", "--tokens", "512", "--question", "64")
_CALLERS = ("--documents", "8", "--document-tokens", "512", "--models", "shape")
_PARTS = ("limits", "segment", "decode", "generate", "strided", "cascade update", "moving rows", "forms")
_ON_REQUEST = ("tuning",)


@dataclass(frozen=True, slots=True)
class Step:
    """One command.

    Attributes:
        command: arguments of Python.
        seconds: longest time; far more than it should take.
    """

    command: tuple[str, ...]
    seconds: int = 240


def environment() -> dict[str, str]:
    """The checkout on the path, kernels compiled instead of interpreted, no hub asked."""
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
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


def steps(into: Path, configuration: Path, *, smoke: bool) -> dict[str, Step]:
    """Steps by name, in order; what a step measures it writes to `into` itself."""
    kernels = ("--json", str(into / "kernels.json"))
    if smoke:
        return {"kernels": Step(("benchmarks/kernels.py", "--smoke", *kernels))}
    common = ("--device", "cuda", "--dtype", "bfloat16", "--json")
    parts = {name: Step(("benchmarks/kernels.py", "--only", name, *kernels)) for name in _PARTS}
    return {
        "tests": Step(_tests(configuration), 300),
        **parts,
        "first token": Step(("benchmarks/ttft.py", *_LLAMA, *_PROMPT, *common, str(into / "ttft.json"))),
        "callers": Step(("benchmarks/batch.py", *_LLAMA, *_CALLERS, *common, str(into / "batch.json"))),
        **{name: Step(("benchmarks/kernels.py", "--only", name, *kernels), 4 * 3600) for name in _ON_REQUEST},
    }


def _tests(configuration: Path) -> tuple[str, ...]:
    spread = ("-n", _SIDE_BY_SIDE) if find_spec("xdist") is not None else ()
    settings = ("-c", str(configuration), "--rootdir", str(ROOT), "-m", "gpu", "-q", *spread)
    return ("-m", "pytest", *settings, "tests/kernels", "tests/test_replay.py")


def run(name: str, step: Step, into: Path, seconds: float) -> dict[str, Any]:
    """Run one step; its output goes to a file and to the terminal."""
    print(f"== {name}: {' '.join(step.command)}", flush=True)
    started = time.time()
    with (into / f"{name.replace(' ', '-')}.txt").open("w+") as log:
        try:
            done = subprocess.run(
                [sys.executable, *step.command], cwd=ROOT, env=environment(), stdout=log,
                stderr=subprocess.STDOUT, check=False, timeout=seconds,
            )  # fmt: skip
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        lines = log.read().splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return {"exit": code, "seconds": round(time.time() - started, 1), "last": lines[-1] if lines else ""}


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Names of the steps that are run.

    Raises:
        SystemExit: a step was asked for that does not exist.
    """
    if only is None:
        return [name for name in names if name not in _ON_REQUEST]
    if unknown := set(only) - set(names):
        sys.exit(f"there is no step {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return [name for name in names if name in only]


def collect(into: Path, found: dict[str, Any], file: Path | None) -> None:
    """Write down what is known so far: the summary, and everything in one file."""
    (into / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    if file is None:
        return
    kept = json.loads(file.read_text()) if file.exists() else {}
    measured = {f.stem: json.loads(f.read_text()) for f in into.glob("*.json") if f.stem != "summary"}
    done = kept.get("steps", {}) | found["steps"]
    before: dict[str, Any] = kept.get("measured", {})
    measured = before | {name: _joined(before.get(name), new) for name, new in measured.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found | {"steps": done, "measured": measured}, indent=1) + "\n")


def _joined(old: Any, new: Any) -> Any:
    """Parts that were measured before stay beside those that were measured now."""
    parts = all(isinstance(x, dict) and all("rows" in part for part in x.values()) for x in (old, new))
    return old | new if parts else new


def main() -> int:
    """Run the steps; 0 if all of them went well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, help="folder for results; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the summary and what every step measured here")
    parser.add_argument("--only", nargs="*", help="names of steps")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds; then no step begins")
    parser.add_argument("--smoke", action="store_true", help="the smallest form, with or without a GPU")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("There is no CUDA device here; --smoke runs what can be run without one.", file=sys.stderr)
        return 2
    end = time.time() + args.total
    with tempfile.TemporaryDirectory(prefix="kvrag-gpu-") as name:
        into = (args.into or Path(name)).resolve()
        into.mkdir(parents=True, exist_ok=True)
        configuration = Path(name) / "pytest.ini"
        configuration.write_text(_PYTEST)
        found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "steps": {}}
        commands = steps(into, configuration, smoke=args.smoke)
        for step in chosen(list(commands), args.only):
            left = end - time.time()
            if left < 5:
                print(f"== {step}: not begun, the time is used up", flush=True)
                found["steps"][step] = {"exit": None, "seconds": 0.0, "last": "not begun"}
                continue
            found["steps"][step] = run(step, commands[step], into, min(left, commands[step].seconds))
            collect(into, found, args.json)
        collect(into, found, args.json)
    print(json.dumps(found, indent=1))
    return 0 if all(step["exit"] == 0 for step in found["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
