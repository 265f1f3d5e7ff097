"""Whether reading ahead pays: a question read over documents in files that the page cache has forgotten.

Three ways take turns: all layers of all documents loaded first; each layer when attention asks for it, the
next one on its way meanwhile; documents prefetched from when a retriever would name them, a given
time before the question is read. All of them verify every byte. The model is random, and so are the rows.

    python benchmarks/prefetch.py
    python benchmarks/prefetch.py --smoke           # seconds
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from ttft import SMOKE, Shape, build, drop_pages

from kvrag.attention import Fixed
from kvrag.fresh import FreshRows
from kvrag.model import Model, quiet
from kvrag.prefill import read
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.prefetch import Prefetch


class Bench:
    """A model, and documents of random rows in a store on disk."""

    def __init__(
        self, model: Model, shape: Shape, folder: Path, num_documents: int, doc_tokens: int, question: int
    ) -> None:
        """Write the documents."""
        generator = torch.Generator().manual_seed(1)
        size = (shape.kv_heads, doc_tokens, shape.head_dim)
        fingerprint, store = model.fingerprint(), DiskStore(folder)

        def rows() -> torch.Tensor:
            return torch.randn(size, generator=generator)

        self.model, self.folder, self.keys = model, folder, []
        for number in range(num_documents):
            key = EntryKey(fingerprint, tuple(range(number, number + doc_tokens)))
            store.put(key, KV(key.tokens, tuple(LayerKV(rows(), rows()) for _ in range(shape.layers))))
            self.keys.append(key)
        store.close()
        self.question = tuple(range(5, 5 + question))
        self.num_bytes = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        self.end = num_documents * doc_tokens


class Ways:
    """One question over one set of documents, loaded in several ways.

    Args:
        bench: model, documents and files.
        head_start: seconds between retrieval and reading the question.
        threads: that read ahead.
    """

    def __init__(self, bench: Bench, head_start: float, threads: int) -> None:
        self._bench, self._head_start, self._threads = bench, head_start, threads

    def _question(self, kvs: list[KV]) -> None:
        bench, segments, at = self._bench, [], 0
        for number, kv in enumerate(kvs):
            segments.append(Segment(kv, at, document=number))
            at += kv.num_tokens
        tables = Fixed(SegmentTable(tuple(segments)))
        positions = range(bench.end, bench.end + len(bench.question))
        read(bench.model, tables, bench.question, positions, FreshRows(bench.model.num_layers))

    def at_once(self) -> float:
        """Seconds from opening the store to the question's end."""
        start = time.perf_counter()
        store = DiskStore(self._bench.folder)
        self._question([store.get(key) for key in self._bench.keys])
        return time.perf_counter() - start

    def when_touched(self) -> float:
        """The same, layer by layer."""
        start = time.perf_counter()
        store = DiskStore(self._bench.folder)
        self._question([store.get(key, by_layer=True) for key in self._bench.keys])
        return time.perf_counter() - start

    def prefetched(self) -> float:
        """The same, without the head start's own time."""
        store = Prefetch(DiskStore(self._bench.folder), threads=self._threads)
        with store.start(self._bench.keys):
            time.sleep(self._head_start)
            start = time.perf_counter()
            self._question([store.get(key, by_layer=True) for key in self._bench.keys])
            end = time.perf_counter()
        store.close()
        return end - start


@torch.inference_mode()
def measure(bench: Bench, ways: Ways, repeat: int, *, cold: bool) -> dict[str, float]:
    """Medians in seconds, the ways taking turns."""
    runs: dict[str, Callable[[], float]] = {
        "at_once": ways.at_once,
        "when_touched": ways.when_touched,
        "prefetched": ways.prefetched,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, run in runs.items():
            if cold:
                drop_pages(bench.folder)
            seconds = run()
            if number:  # the first round warms up what is not the page cache
                times[name].append(seconds)
    found = {name: median(values) for name, values in times.items()}
    found |= {f"{name}_least": min(values) for name, values in times.items()}
    return found


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--question", type=int, default=32, help="tokens")
    parser.add_argument("--head-start", type=float, default=0.1, help="seconds")
    parser.add_argument("--threads", type=int, default=1, help="that read ahead")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once")
    args = parser.parse_args()
    quiet()
    if args.smoke:
        args.documents, args.tokens, args.repeat, args.head_start = 2, 32, 1, 0.01
    with tempfile.TemporaryDirectory(prefix="kvrag-prefetch-") as folder:
        shape = SMOKE if args.smoke else Shape()
        model = build(shape, torch.float32, "cpu")
        bench = Bench(model, shape, Path(folder), args.documents, args.tokens, args.question)
        ways = Ways(bench, args.head_start, args.threads)
        found = measure(bench, ways, args.repeat, cold=not args.warm)
        made = {
            "date": time.strftime("%Y-%m-%d"),
            "store_bytes": bench.num_bytes,
            "documents": args.documents,
            "document_tokens": args.tokens,
            "head_start": args.head_start,
            "reading_threads": args.threads,
            "computing_threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "cold": not args.warm,
            "repeat": args.repeat,
        }
    print(json.dumps(made))
    for name in ("at_once", "when_touched", "prefetched"):
        print(f"{name:14}{found[name] * 1e3:9.0f} ms   least {found[f'{name}_least'] * 1e3:7.0f} ms")
    if args.json:
        args.json.write_text(json.dumps({"conditions": made, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
