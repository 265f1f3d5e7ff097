"""Several callers at once: tokens per second and time to first token, and the same by transformers.

All ways run in one process on the same requests, one after the other in every round; medians are printed.

- together: kvrag as it is; whoever is due is read in one pass.
- turns: a pass per request and token: the same worker, whose passes hold one request each.
- one by one: transformers' `generate`, one request after the other; who comes last waits for all.
- batched: one `generate` over all requests, padded on the left.

Documents are in memory and were read before; `generate` reads every prompt in full. Callers draw their
documents from one pool, as askers of one collection do.

    python benchmarks/batch.py                        # the reader, and a random shape
    python benchmarks/batch.py --models shape --shape 0.1B --documents 8 --document-tokens 512
    python benchmarks/batch.py --smoke                # seconds, for continuous integration
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from ttft import SHAPES, SMOKE, build, processor

from kvrag.baseline import ordinary_answer
from kvrag.config import Sampling
from kvrag.decode import Chooser, Step, configuration
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
    """What callers ask.

    Attributes:
        documents: per request.
        document_tokens: of each document, where they are made up for a random shape.
        new_tokens: of each answer.
        pool: documents that all callers draw from.
    """

    documents: int = 4
    document_tokens: int = 350
    new_tokens: int = 24
    pool: int = 24


def requests(model: Model, load: Load, num: int) -> list[dict[str, Any]]:
    """Arguments of `Engine.stream` for `num` callers."""
    pool = max(load.pool, load.documents)
    texts = [document.text for document in collection(num=pool)]
    if model.name.startswith("random"):  # its words mean nothing to it
        texts = [_sized(model, text, load.document_tokens) for text in texts]
    form = RagPrompt.of(model.text)
    sampling = Sampling(max_new_tokens=load.new_tokens, ignore_eos=True)
    found = []
    for i in range(num):
        own = [texts[(5 * i + j) % pool] for j in range(load.documents)]
        prompt = form.render(own, f"What is said of number {i:03}?")
        found.append({"prompt": prompt, "chunks": own, "prefix": form.prefix, "sampling": sampling})
    return found


def _sized(model: Model, text: str, num_tokens: int) -> str:
    """About so many tokens of a text, repeated as often as it takes."""
    words = text.split()
    per_word = len(model.text.tokenize(text)) / len(words)
    return " ".join(words[i % len(words)] for i in range(max(1, round(num_tokens / per_word))))


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


def one_by_one(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
    """`generate` for one request after the other; see `serve` for what it returns."""
    firsts, start = [], time.perf_counter()
    for prompt in prompts:
        waited = time.perf_counter() - start
        answer = ordinary_answer(model, prompt, Sampling(max_new_tokens=new_tokens, ignore_eos=True))
        firsts.append(waited + answer.first_token)
    return len(prompts) * new_tokens / (time.perf_counter() - start), median(firsts)


@torch.inference_mode()
def batched(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
    """One `generate` for all requests; see `serve` for what it returns."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    seen = torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    settings = configuration(model.network, Sampling(max_new_tokens=new_tokens, ignore_eos=True))
    settings.use_cache = True
    arrivals: list[float] = []
    generate: Any = model.network.generate  # of a mixin that the base class does not name
    start = time.perf_counter()
    generate(
        ids.to(model.device),
        attention_mask=seen.long().to(model.device),
        generation_config=settings,
        streamer=_Arrivals(arrivals),
    )
    return len(prompts) * new_tokens / (arrivals[-1] - start), arrivals[1] - start


@dataclass(frozen=True)
class _Arrivals:
    """A streamer for any number of requests: when their tokens come; the prompts come first."""

    times: list[float]

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def tokens_of(model: Model, request: dict[str, Any]) -> tuple[int, ...]:
    """The prompt as `generate` takes it."""
    return model.text.tokenize(request["prompt"], first=True)


Way = Callable[[Sequence[dict[str, Any]]], tuple[float, float]]


def measure(
    model: Model, load: Load, callers: Sequence[int], repeat: int, full_repeat: int
) -> list[dict[str, float]]:
    """Medians for each number of callers."""
    rows = []
    asked = requests(model, load, max(callers))
    with Engine(model, MemoryStore(), max_batch=max(callers)) as engine:
        for stream in engine.batch(asked):  # documents are encoded, and everything is warm
            for _ in stream:
                pass
        engine.close()
        passes = {"together": Passes(model, engine.pass_tokens), "turns": Turns(model, engine.pass_tokens)}
        ways: dict[str, Way] = {
            name: lambda some, own=own: serve(engine, some, own)  # type: ignore[misc]
            for name, own in passes.items()
        }
        for name, theirs in (("one_by_one", one_by_one), ("batched", batched)):
            ways[name] = lambda some, theirs=theirs: theirs(  # type: ignore[misc]
                model, [tokens_of(model, request) for request in some], load.new_tokens
            )
        for num in callers:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for i in range(max(repeat, full_repeat)):
                for way, run in ways.items():
                    if i < (repeat if way in passes else full_repeat):
                        found[way].append(run(asked[:num]))
            length = median(len(tokens_of(model, request)) for request in asked[:num])
            rows.append({"callers": float(num), "prompt_tokens": float(length), **_medians(found)})
    return rows


def _medians(found: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Of each way, and how many times better kvrag is than the others."""
    row = {}
    for way, pairs in found.items():
        if pairs:
            row[f"tokens_per_second_{way}"] = median(rate for rate, _ in pairs)
            row[f"first_token_{way}"] = median(first for _, first in pairs)
    for way in (name for name, pairs in found.items() if pairs and name != "together"):
        row[f"ratio_tokens_{way}"] = row["tokens_per_second_together"] / row[f"tokens_per_second_{way}"]
        row[f"ratio_first_token_{way}"] = row[f"first_token_{way}"] / row["first_token_together"]
    return row


def report(name: str, rows: Sequence[dict[str, float]]) -> str:
    """The figures as a table."""
    lines = [
        name,
        f"{'callers':>7}  {'way':<12}{'tokens/s':>10}{'together is':>14}{'first token':>15}{'':>9}",
    ]
    for r in rows:
        for way in ("together", "turns", "one_by_one", "batched"):
            if f"first_token_{way}" not in r:
                continue
            rate, first = r[f"tokens_per_second_{way}"], r[f"first_token_{way}"] * 1e3
            ratios = [r.get(f"ratio_{what}_{way}") for what in ("tokens", "first_token")]
            times = ["" if ratio is None else f"{ratio:.1f}x" for ratio in ratios]
            lines.append(
                f"{r['callers']:>7.0f}  {way:<12}{rate:>10.1f}{times[0]:>14}{first:>12.0f} ms{times[1]:>9}"
            )
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
    parser.add_argument(
        "--document-tokens", type=int, default=Load.document_tokens, help="of each, for the random shape"
    )
    parser.add_argument("--full-repeat", type=int, default=1, help="runs of transformers; 0: none")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once")
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    load, shape, dtype = (
        Load(args.documents, args.document_tokens, args.tokens),
        SHAPES[args.shape],
        getattr(torch, args.dtype),
    )
    if args.smoke:
        load, shape, args.callers, args.repeat, args.models = Load(2, 40, 4, 6), SMOKE, [1, 3], 1, ["shape"]
    start, found = os.getloadavg()[0], {}
    for kind in args.models:
        reader = kind == "reader"
        model = Model.load(device=args.device, dtype=dtype) if reader else build(shape, dtype, args.device)
        found[kind] = measure(model, load, args.callers, args.repeat, args.full_repeat)
        size = sum(p.numel() for p in model.network.parameters()) / 1e6
        print(report(f"{model.name}, {size:.1f} million parameters", found[kind]))
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "load_before": start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "load": asdict(load),
        "shape": asdict(shape),
        "repeat": args.repeat,
        "full_repeat": args.full_repeat,
    }
    print(", ".join(f"{key}={value}" for key, value in conditions.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"conditions": conditions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
