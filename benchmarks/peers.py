"""Time to first token beside other ways to answer from documents: transformers, TurboRAG's way, llama.cpp.

All sides have the same random weights and answer the same kind of prompt, taking turns in one run: with
nothing known, with the same documents again, with some of them, with any of them; and a row of requests with
documents drawn at random. Medians are printed.

    python benchmarks/peers.py                           # 0.4B shape, 2, 4 and 8 documents x 512 tokens
    python benchmarks/peers.py --llama peer/bin/python   # and llama.cpp
    python benchmarks/peers.py --smoke                   # seconds, for continuous integration

llama.cpp is built from its source, for the processor at hand, in an environment of its own:

    python -m venv peer
    CMAKE_ARGS="-DGGML_NATIVE=ON" peer/bin/pip install llama-cpp-python gguf safetensors
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
from typing import Any

import torch
import transformers
from peers_parts import page
from peers_parts.agreement import agreement
from peers_parts.asked import Pool, many, shares
from peers_parts.llama import Llama
from peers_parts.ours import Ours
from peers_parts.plain import Plain
from peers_parts.taking import Sides, documents, turn
from peers_parts.turborag import TurboRag
from ttft import SHAPES, SMOKE, Shape, build, processor

from kvrag.encoding import encode
from kvrag.model import Model, quiet

VARIABLE = "KVRAG_PEERS_LLAMA"
MISSING = f"""llama.cpp is left out: name a Python that has it by --llama or {VARIABLE}; to make one:
    python -m venv peer
    CMAKE_ARGS="-DGGML_NATIVE=ON" peer/bin/pip install llama-cpp-python gguf safetensors"""


def conditions(args: argparse.Namespace, shape: Shape, model: Model) -> dict[str, Any]:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "shape": asdict(shape),
        "documents": args.documents,
        "document_tokens": args.tokens,
        "question_tokens": args.question,
        "new_tokens": args.decode,
        "pool": args.pool,
        "rounds": args.rounds,
        "quick": args.quick,
    }


def set_up(
    args: argparse.Namespace, shape: Shape, model: Model, folder: Path
) -> tuple[Sides, dict[str, Any]]:
    """Encode the pool, fill both stores of it, start llama.cpp; all sides, and what each keeps per token."""
    pool = Pool(args.pool, args.tokens, args.question, shape.vocabulary)
    start = time.perf_counter()
    rows = encode(model, pool.documents)
    seconds = (time.perf_counter() - start) / len(rows)
    files = folder / "files"  # those that are read while the clock runs
    for place in (files, files / "turborag", folder / "peer"):
        place.mkdir()
    turbo = TurboRag(model.network, files / "turborag", pool)
    for number, kv in enumerate(rows):
        turbo.save(number, kv)
    stored: dict[str, Ours | TurboRag] = {"TurboRAG's way": turbo}
    held = {"TurboRAG's way": (files / "turborag" / "0.pt").stat().st_size / args.tokens}
    for name, codec in (("kvrag", "raw"), ("kvrag int8", "int8")):
        ours = Ours(model, files / codec, pool, rows, codec=codec)
        stored[name] = ours
        held[name] = ours.num_bytes / (len(rows) * args.tokens)
    llama = None
    if args.llama:
        longest = max(args.documents) * args.tokens + args.question + args.decode
        llama = Llama(args.llama, model.network, folder / "peer", args.kinds, longest)
    sides = Sides(pool, files, Plain(model.network), stored, llama, args.decode, args.quick)
    return sides, {"bytes_per_token": held, "seconds_to_encode_a_document": seconds}


def measure(args: argparse.Namespace, sides: Sides, found: dict[str, Any]) -> None:
    """Put all figures into `found`."""
    pool, llama = sides.pool, sides.llama
    found["agreement"] = agreement(sides, min(args.documents))
    if llama:
        found["llama"] = llama.told
        for kind in llama.kinds:
            llama.forget(kind)
            llama.ask(kind, pool.prompt(pool.ask((0,))), 1)
            found["bytes_per_token"][f"llama.cpp {kind}"] = llama.keep(kind) / (args.tokens + args.question)
    layers = sides.stored["TurboRAG's way"].load(0)  # as transformers holds them
    found["bytes_per_token"]["transformers"] = layers.nbytes / args.tokens
    found["cases"] = {str(count): documents(sides, count, args.rounds) for count in args.documents}
    drawn = many(args.requests, args.pool, args.turn_documents, 0.0)
    found["turn"] = {
        "requests": args.requests,
        "documents": args.turn_documents,
        "sides": turn(sides, [pool.ask(numbers) for numbers in drawn], args.turn_kinds),
    }
    found["shares"] = {
        f"{skew:g}": shares(
            many(1000, args.pool, args.turn_documents, skew), args.pool // args.turn_documents
        )
        for skew in (0.0, 1.0)
    }


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", default=os.environ.get(VARIABLE), help="Python of its environment")
    parser.add_argument("--kinds", nargs="+", default=["F32", "BF16", "Q8_0"], help="of llama.cpp's weights")
    parser.add_argument("--turn-kinds", nargs="+", default=["Q8_0"], help="of those, in the row of requests")
    parser.add_argument("--shape", choices=SHAPES, default="0.5B", help="of the random model")
    parser.add_argument("--documents", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--question", type=int, default=32, help="tokens")
    parser.add_argument("--pool", type=int, default=32, help="documents that there are")
    parser.add_argument("--requests", type=int, default=10, help="of the turn")
    parser.add_argument("--turn-documents", type=int, default=4, help="of each of its requests")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", type=int, default=3, help="how often a round takes what takes no second")
    parser.add_argument(
        "--decode", type=int, default=17, help="tokens of an answer; all but the first are timed"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once, without llama.cpp")
    args = parser.parse_args()
    if not set(args.turn_kinds) <= set(args.kinds):
        parser.error(f"--turn-kinds {' '.join(args.turn_kinds)}: expected some of --kinds")
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.smoke:
        args.llama, args.documents, args.tokens, args.pool, args.decode = None, [2, 4], 32, 8, 4
        args.question, args.requests, args.rounds, args.quick = 8, 3, 1, 1
    shape = SMOKE if args.smoke else SHAPES[args.shape]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvrag-peers-") as name:
        model = build(shape, torch.float32, "cpu")
        found: dict[str, Any] = {"conditions": conditions(args, shape, model)}
        sides, known = set_up(args, shape, model, Path(name))
        found |= known
        measure(args, sides, found)
        if sides.llama:
            sides.llama.close()
    found["conditions"] |= {
        "load_after": round(os.getloadavg()[0], 1),
        "seconds": time.perf_counter() - start,
    }
    print("\n".join(page.lines(found)))
    if not args.llama:
        print(MISSING)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
