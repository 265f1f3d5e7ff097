"""What bounded memories of chats keep, at equal bytes, on the reader; names held out of its training.

Facts told long ago, passkeys in hay, streaming perplexity: for a window with sinks, cascades, ladders, both
together, and what was surprising; each with and without an archive of what was forgotten. Work is cut into
units (one policy, one batch of chats); what is in the run folder is not done again, so a run can be stopped
and gone on with, by several processes.

    python benchmarks/memory.py --minutes 60             # as many units as fit
    python benchmarks/memory.py --part 1/2               # every second unit; 2/2 in another process
    python benchmarks/memory.py --tasks near far         # these only
    python benchmarks/memory.py --time                   # speed: strides, budgets, lengths
    python benchmarks/memory.py --report                 # sum up what is there
    python benchmarks/memory.py --smoke                  # seconds, for continuous integration; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_parts.plots import plot
from memory_parts.records import Folder, Record, key_of, pack
from memory_parts.summary import printed, summary
from memory_parts.timing import measure
from memory_parts.units import TASKS, Worker, units
from tqdm import tqdm

from kvrag.model import READER, Model, quiet

ROOT = Path(__file__).parent.parent


def conditions(args: argparse.Namespace, model: Model, weights: str, records: Sequence[Record]) -> Any:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": str(args.model),
        "weights": weights[:16],
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "layers": model.num_layers,
        "window": model.max_length,
        "budget": args.budget,
        "bytes_per_token": bytes_per_token(model),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def bytes_per_token(model: Model) -> int:
    """Keys and values of all layers and heads."""
    config = model.network.config
    return int(2 * model.num_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize)


def parsed() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=READER)
    parser.add_argument(
        "--budget", type=int, default=256, help="tokens; some are measured at 2 and 4 times it"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--policies", nargs="+", help="only these")
    parser.add_argument("--batches", type=int, default=13, help="rounds; a task stops when it has enough")
    parser.add_argument("--minutes", type=float, help="begin no unit after that")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th unit, from the I-th on")
    parser.add_argument("--threads", type=int, default=1)
    data = ROOT / "docs" / "data"
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "memory", help="folder of raw records")
    parser.add_argument("--json", type=Path, default=data / "memory.json")
    parser.add_argument("--archive", type=Path, default=data / "memory-records.jsonl.xz")
    parser.add_argument("--times", type=Path, default=data / "memory-time.json")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--time", action="store_true", help="measure speed instead")
    parser.add_argument("--report", action="store_true", help="do nothing, sum up the run folder")
    parser.add_argument("--smoke", action="store_true", help="one small batch, nothing is kept")
    return parser.parse_args()


def main() -> None:
    """Measure, sum up."""
    args = parsed()
    quiet()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="kvrag-memory-") as temporary:
        if args.smoke:
            args.run, args.plots = Path(temporary, "run"), Path(temporary)
            args.json, args.times = Path(temporary, "memory.json"), Path(temporary, "time.json")
            args.archive, args.batches, args.budget = Path(temporary, "records.xz"), 1, 64
            args.policies = ["window", "ladder 1/2", "salient"]
        if args.time or args.smoke:
            times = measure(smoke=args.smoke)
            args.times.write_text(json.dumps(times, indent=1) + "\n")
            print(json.dumps(times, indent=1))
        if not args.time:
            _run(args)


def _run(args: argparse.Namespace) -> None:
    model = Model.load(args.model)
    weights = model.fingerprint().model
    folder = Folder(args.run)
    folder.adopt(weights, args.archive)
    if not args.report:
        _work(args, model, folder)
    records = folder.records()
    data = {"conditions": conditions(args, model, weights, records), **summary(records)}
    print(printed(data))
    if args.report or args.smoke:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(data, indent=None, separators=(",", ":")).replace("],[", "],\n[") + "\n"
        )
        pack(args.archive, weights, records)
        plot(data, args.plots)


def _work(args: argparse.Namespace, model: Model, folder: Folder) -> None:
    done = {key_of(record) for record in folder.records()}
    first, step = map(int, args.part.split("/"))
    # Every process counts the same units, whatever is done when it begins.
    mine = list(units(args.tasks, args.budget, args.batches))[first - 1 :: step]
    left = [unit for unit in mine if unit.key not in done]
    if args.policies:
        left = [unit for unit in left if unit.policy in args.policies]
    worker = Worker(model, batch=2, scale=8) if args.smoke else Worker(model)
    began = time.monotonic()
    for unit in tqdm(left, disable=args.smoke):
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            return
        folder.add(first, worker.do(unit))


if __name__ == "__main__":
    main()
