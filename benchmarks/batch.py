"""Several callers at once: tokens per second and time to first token, read together and taking turns.

Both ways run in one process on the same requests, one after the other in every round; medians are printed.
Documents are in memory. Taking turns is what a pass per request and token gives: the same worker, whose
passes hold one request each.

    python benchmarks/batch.py                        # the reader, and a random 0.4B shape
    python benchmarks/batch.py --json docs/data/batch.json
    python benchmarks/batch.py --smoke                # seconds, for continuous integration
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from ttft import SHAPES, SMOKE, build

from kvrag.config import Sampling
from kvrag.decode import Chooser, Step
from kvrag.engine import Engine
from kvrag.model import Model, quiet
from kvrag.passes import Outcome, Passes
from kvrag.prefill import Want
from kvrag.prompt import RagPrompt
from kvrag.reader.collection import documents as collection
from kvrag.store.memory import MemoryStore
from kvrag.worker import Worker


class Turns(Passes):
    """Everybody in a pass of his own."""

    def run(self, wants: Sequence[Want]) -> list[Outcome]:
        """One after the other."""
        return [outcome for want in wants for outcome in super(Turns, self).run([want])]


class Watch:
    """Notes when tokens are chosen, by answer."""

    def __init__(self) -> None:
        """Begin to watch."""
        self.times: dict[int, list[float]] = {}
        self._step = Chooser.step

    def __enter__(self) -> Watch:
        """Look on."""
        times, step = self.times, self._step

        def noted(chooser: Chooser, *args: Any) -> Step:
            found = step(chooser, *args)
            times.setdefault(id(chooser), []).append(time.perf_counter())
            return found

        Chooser.step = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        """Look away."""
        Chooser.step = self._step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Load:  # slots would hide the defaults that the arguments take
    """What callers ask: each has documents of his own.

    Attributes:
        documents: per request.
        words: of each document, where they are made up.
        new_tokens: of each answer.
    """

    documents: int = 4
    words: int = 60
    new_tokens: int = 24


def requests(model: Model, load: Load, num: int) -> list[dict[str, Any]]:
    """Arguments of `Engine.stream` for `num` callers."""
    texts = [document.text for document in collection(num=num * load.documents)]
    if model.name.startswith("random"):  # its tokenizer knows letters only
        texts = [" ".join((text * 9).split()[: load.words]) for text in texts]
    form = RagPrompt.of(model.text)
    sampling = Sampling(max_new_tokens=load.new_tokens, ignore_eos=True)
    found = []
    for i in range(num):
        own = texts[i * load.documents : (i + 1) * load.documents]
        prompt = form.render(own, f"What is said of number {i}?")
        found.append({"prompt": prompt, "chunks": own, "prefix": form.prefix, "sampling": sampling})
    return found


def serve(engine: Engine, asked: Sequence[dict[str, Any]], passes: Passes) -> tuple[float, float]:
    """Answer requests that come at once.

    Returns:
        Tokens per second of all together; median time to first token in seconds.
    """
    engine._worker = Worker("benchmark", server=passes, max_running=len(asked))
    begin = threading.Event()
    waiting = engine._worker.submit(lambda: iter([begin.wait()]))
    streams = engine.batch(asked)
    with Watch() as watch:
        start = time.perf_counter()
        begin.set()
        for stream in (waiting, *streams):
            for _ in stream:
                pass
    engine._worker.close()
    times = list(watch.times.values())
    assert len(times) == len(asked)
    seconds = max(t[-1] for t in times) - start
    return sum(map(len, times)) / seconds, median(t[0] for t in times) - start


def measure(model: Model, load: Load, callers: Sequence[int], repeat: int) -> list[dict[str, float]]:
    """Medians for each number of callers."""
    rows = []
    asked = requests(model, load, max(callers))
    with Engine(model, MemoryStore(), max_batch=max(callers)) as engine:
        for stream in engine.batch(asked):  # documents are encoded, and everything is warm
            for _ in stream:
                pass
        engine.close()
        ways = {"together": Passes(model, engine.pass_tokens), "turns": Turns(model, engine.pass_tokens)}
        for num in callers:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(repeat):
                for way, passes in ways.items():
                    found[way].append(serve(engine, asked[:num], passes))
            row = {"callers": float(num)}
            for way, pairs in found.items():
                row[f"tokens_per_second_{way}"] = median(rate for rate, _ in pairs)
                row[f"first_token_{way}"] = median(first for _, first in pairs)
            row["ratio_tokens"] = row["tokens_per_second_together"] / row["tokens_per_second_turns"]
            row["ratio_first_token"] = row["first_token_turns"] / row["first_token_together"]
            rows.append(row)
    return rows


def report(name: str, rows: Sequence[dict[str, float]]) -> str:
    """The figures as a table."""
    lines = [name, "callers  tokens/s together  in turns             first token   in turns"]
    for r in rows:
        rates = f"{r['tokens_per_second_together']:>19.1f}{r['tokens_per_second_turns']:>10.1f}"
        firsts = f"{r['first_token_together'] * 1e3:>13.0f} ms{r['first_token_turns'] * 1e3:>8.0f} ms"
        ratios = r["ratio_tokens"], r["ratio_first_token"]
        lines.append(f"{r['callers']:>7.0f}{rates}{ratios[0]:>7.1f}x{firsts}{ratios[1]:>7.1f}x")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["reader", "shape"], choices=["reader", "shape"])
    parser.add_argument("--shape", choices=SHAPES, default="0.5B", help="of the random model")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--documents", type=int, default=Load.documents, help="of each prompt")
    parser.add_argument("--words", type=int, default=Load.words, help="of each document of the random shape")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once")
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    load, shape, dtype = (
        Load(args.documents, args.words, args.tokens),
        SHAPES[args.shape],
        getattr(torch, args.dtype),
    )
    if args.smoke:
        load, shape, args.callers, args.repeat, args.models = Load(2, 12, 4), SMOKE, [1, 3], 1, ["shape"]
    start, found = os.getloadavg()[0], {}
    for kind in args.models:
        reader = kind == "reader"
        model = Model.load(device=args.device, dtype=dtype) if reader else build(shape, dtype, args.device)
        found[kind] = measure(model, load, args.callers, args.repeat)
        size = sum(p.numel() for p in model.network.parameters()) / 1e6
        print(report(f"{model.name}, {size:.1f} million parameters", found[kind]))
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor(),
        "threads": torch.get_num_threads(),
        "load_before": start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "load": asdict(load),
        "shape": asdict(shape),
        "repeat": args.repeat,
    }
    print(", ".join(f"{key}={value}" for key, value in conditions.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"conditions": conditions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
