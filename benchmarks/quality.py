"""Quality and speed of every policy against full attention, on the reader, names held out of its training.

Questions are asked in turns: in each, one of every kind for every number of documents, so that a run which is
stopped early has asked every cell equally often. Raw records go to a run folder, where runs with other seeds
add theirs; what was asked there is not asked again, but policies that are missing are. The report packs all
records into an archive, with which a new folder begins.

    python benchmarks/quality.py --minutes 60           # as many turns as fit
    python benchmarks/quality.py --seed 1               # in a second process, into the same folder
    python benchmarks/quality.py --rest-every 9         # all but the core of the comparison less often
    python benchmarks/quality.py --documents 110 --kinds one   # eight windows of one-document questions
    python benchmarks/quality.py --policies "naive" "PCW"      # these alone
    python benchmarks/quality.py --seed 2 --timed       # alone on a quiet machine: its times are reported
    python benchmarks/quality.py --report               # sum up what is there, and ask nothing
    python benchmarks/quality.py --smoke                # seconds, for continuous integration; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from quality_parts.asking import VARIANTS, Bench
from quality_parts.calibration import calibrate, chosen, described
from quality_parts.contexts import KINDS, draw, kinds_of
from quality_parts.plots import plot
from quality_parts.policies import CORE, CORE_REPAIRS, FULL, TRUNCATED, Entry, entries
from quality_parts.records import Folder, key_of
from quality_parts.summary import Record, rows_of, summary
from tqdm import tqdm

from kvrag.model import READER, Model, quiet

ROOT = Path(__file__).parent.parent
NUMBERS = (1, 2, 5, 10, 20, 40, 80)
MANY = 40


def is_core(entry: Entry, num_documents: int) -> bool:
    """Whether a policy answers in every turn."""
    return entry.name in CORE or (num_documents < MANY and entry.name in CORE_REPAIRS)


def due(policies: Sequence[Entry], turn: int, num: int, rest_every: int) -> list[Entry]:
    """Policies that answer in a turn."""
    able = [entry for entry in policies if num >= entry.least]
    return able if turn % rest_every == 0 else [entry for entry in able if is_core(entry, num)]


def named(policies: Sequence[Entry], names: Sequence[str] | None) -> list[Entry]:
    """Those with these names; None: all."""
    known = {entry.name: entry for entry in policies}
    if missing := [name for name in names or () if name not in known]:
        sys.exit(f"no policy is called {', '.join(missing)}; there are: {', '.join(known)}")
    return list(policies) if names is None else [known[name] for name in names]


def turns(
    args: argparse.Namespace, folder: Folder, policies: Sequence[Entry]
) -> Iterator[tuple[int, int, dict[str, list[Entry]]]]:
    """What is left to ask, as (turn, documents, policies by kind), until questions or time are used up."""
    done = {key_of(record): record["answers"] for record in folder.records()}
    began, longest = time.monotonic(), 0.0
    for turn in tqdm(range(args.questions), desc="turns", disable=args.smoke):
        start = time.monotonic()
        # A turn is only begun if one like the longest so far still fits: cells stay equally full.
        if args.minutes and start - began + longest > 60 * args.minutes:
            return
        for num in args.documents:
            wanted = due(policies, turn, num, args.rest_every)
            left = {}
            for kind in (kind for kind in kinds_of(num) if kind in args.kinds):
                answers = done.get((args.seed, turn, num, kind), {})
                if missing := [entry for entry in wanted if entry.name not in answers]:
                    left[kind] = missing
            if left:
                yield turn, num, left
        longest = max(longest, time.monotonic() - start)


def asked(
    bench: Bench,
    policies: dict[str, list[Entry]],
    seed: int,
    turn: int,
    num: int,
    *,
    timed: bool = False,
    told: dict[str, Any] | None = None,
) -> list[Record]:
    """One question of each kind, in the ways given for it; `told` has earlier runs' answers by kind."""
    found = []
    for context in draw(seed, num, turn):  # always the same, whatever of it is left to ask
        wanted = [(q, policies[q.question.kind]) for q in context.asked if q.question.kind in policies]
        if not wanted:
            continue
        start = time.process_time()
        records = bench.open(context).ask(wanted, seed=turn * 1000 + num, timed=timed, told=told)
        took = round((time.process_time() - start) / len(records), 3)
        made = {"seed": seed, "turn": turn}, {"cpu_seconds": took} | ({"timed": True} if timed else {})
        found += [made[0] | record | made[1] for record in records]
    return found


def check_alike(some: Sequence[Record], others: Sequence[Record]) -> None:
    """Stop if policies that were read together answer otherwise than each on its own."""
    for one, other in zip(some, others, strict=True):
        for name, answer in one["answers"].items():
            told = other["answers"][name]
            if (answer[:2], answer[3]) != (told[:2], told[3]):
                sys.exit(f"{name}, {one['kind']}: read together {answer}, alone {told}")


def conditions(
    args: argparse.Namespace, model: Model, kept: dict[str, Any], records: Sequence[Record]
) -> dict[str, Any]:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": str(args.model),
        "weights": kept["weights"][:16],
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "layers": model.num_layers,
        "window": kept["window"],
        "seeds": sorted({r["seed"] for r in records}),
        "questions": len(records),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def printed(data: dict[str, Any]) -> str:
    """Exact match of every policy for all kinds together and for each, by number of documents."""
    cells = {(c["policy"], c["documents"], c["kind"]): c for c in rows_of(data["cells"])}
    numbers = sorted({num for _, num, _ in cells})
    lines = [", ".join(f"{k}={v}" for k, v in data["conditions"].items())]
    for kind in dict.fromkeys(kind for _, _, kind in cells):
        lines += ["", f"{kind + ': exact match at N documents':<44}" + "".join(f"{n:>7}" for n in numbers)]
        for policy in dict.fromkeys(policy for policy, _, _ in cells):
            here = [cells.get((policy, num, kind)) for num in numbers]
            if any(here):
                shares = (f"{c['right'] / c['asked']:>7.3f}" if c else " " * 7 for c in here)
                lines.append(f"{policy:<44}" + "".join(shares))
    return "\n".join(lines)


def written(data: dict[str, Any]) -> str:
    """JSON with one line for each row of a table."""
    tables = {}
    for name, value in data.items():
        if isinstance(value, dict) and set(value) == {"columns", "rows"}:
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value["rows"])
            tables[name] = f'{{"columns": {json.dumps(value["columns"])}, "rows": [\n{rows}\n]}}'
        else:
            tables[name] = json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in tables.items()) + "\n}\n"


def parsed() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=READER)
    parser.add_argument("--device")
    parser.add_argument("--questions", type=int, default=500, help="of each kind and number of documents")
    parser.add_argument("--documents", type=int, nargs="+", default=list(NUMBERS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="only these")
    parser.add_argument("--minutes", type=float, help="stop when the next turn would not fit")
    parser.add_argument("--families", nargs="+", help="only these families of policies, and re-positioning")
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="only these, named as in the tables")
    parser.add_argument(
        "--rest-every",
        type=int,
        default=1,
        help="what is not in the core of the comparison answers in every K-th turn only, and so does every "
        f"repair from {MANY} documents on; an odd K, so that the gold document's rank goes on rotating",
    )
    parser.add_argument(
        "--full-every",
        type=int,
        default=1,
        help=f"full attention reads {MANY} documents and more in every K-th turn only (odd)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timed",
        action="store_true",
        help="nothing else runs on this machine: every policy is read on its own, and times are written down",
    )
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "quality", help="folder of raw records")
    parser.add_argument("--window", type=int, default=2304, help="positions the model was trained for")
    parser.add_argument("--longest", type=int, default=16_000, help="most tokens that are read in full")
    parser.add_argument("--calibrate", type=int, default=16, help="turns of the sample that chooses layers")
    parser.add_argument("--score-layers", type=int, nargs="+", help="layers to score by, instead of choosing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "data" / "quality.json")
    parser.add_argument(
        "--archive",
        type=Path,
        default=ROOT / "docs" / "data" / "quality-records.jsonl.xz",
        help="all records, written with the report; an empty run folder begins with them",
    )
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--report", action="store_true", help="ask nothing, sum up the run folder")
    parser.add_argument("--smoke", action="store_true", help="one turn over few documents, nothing is kept")
    return parser.parse_args()


def main() -> None:
    """Calibrate, ask, sum up."""
    args = parsed()
    quiet()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="kvrag-quality-") as temporary:
        if args.smoke:
            args.documents, args.questions, args.calibrate, args.window = [1, 3], 1, 1, 400
            args.run, args.json = Path(temporary), Path(temporary, "quality.json")
            args.plots, args.archive = Path(temporary), Path(temporary, "records.jsonl.xz")
        _run(args)


def _run(args: argparse.Namespace) -> None:
    model = Model.load(args.model, device=args.device)
    bench = Bench(model, window=args.window, longest=args.longest)
    folder = Folder(args.run)
    made: dict[str, Any] = {
        "weights": model.fingerprint().model,
        "window": args.window,
        "score_layers": args.score_layers,
    }
    if args.archive and folder.unpack(args.archive, made):
        print(f"went on with {args.archive}")
    if not folder.run.exists():
        made["calibration"] = calibrate(bench, (3,) if args.smoke else (5, 10, 20), args.calibrate)
    kept = folder.adopt(made)
    scores = chosen(kept["calibration"], model.num_layers, args.score_layers)
    families = {"placement", *args.families} if args.families else None
    policies = [e for e in entries(scores, args.window) if families is None or e.family in families]
    asking = named(policies, args.policies)
    if not args.report:
        known = {key_of(record): record["answers"] for record in folder.records()}
        for turn, num, wanted in turns(args, folder, asking):
            bench.longest = 0 if num >= MANY and turn % args.full_every else args.longest
            told = {kind: known.get((args.seed, turn, num, kind), {}) for kind in wanted}
            found = asked(bench, wanted, args.seed, turn, num, timed=args.timed, told=told)
            if args.smoke:
                alone = asked(bench, wanted, args.seed, turn, num, timed=True)
                check_alike(found, alone)
                found = alone
            folder.add(args.seed, found)
    records = folder.records()
    if not records:
        sys.exit(f"{args.run} has no records; run without --report")
    data = {
        "conditions": conditions(args, model, kept, records),
        "calibration": {**kept["calibration"], "chosen": described(scores)},
        "variants": list(VARIANTS),
        "families": {FULL: "reference", TRUNCATED: "reference"} | {e.name: e.family for e in policies},
        **summary(records),
    }
    print(printed(data))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(written(data))
    if args.archive:
        folder.pack(args.archive)
    plot(data, args.plots)


if __name__ == "__main__":
    main()
