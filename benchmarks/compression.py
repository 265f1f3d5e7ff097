"""Lossless compression and encryption of caches: how much smaller, how fast, and when reading less pays.

One thread, the best of several runs, beside a plain copy of the same bytes in the same process.

    python benchmarks/compression.py            # the shipped reader, and a 0.5B Llama shape of random weights
    python benchmarks/compression.py --smoke    # seconds, for continuous integration

Rows of random weights are no rows of a model; of those here only the reader's are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from ttft import Shape, build

from kvrag.encoding import encode
from kvrag.model import Model, quiet
from kvrag.reader.world import World
from kvrag.segments import KV
from kvrag.store import layout, planes
from kvrag.store.codec import CODECS
from kvrag.store.sealing import MasterKey

CASES = (
    ("raw", torch.float32),
    ("raw", torch.bfloat16),
    ("raw", torch.float16),
    ("fp8", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int4", torch.bfloat16),
)


def best_of(runs: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measured(kv: KV, model: Model, codec: str, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """Ratio, and gigabytes of a codec's bytes per second, of all layers of an entry."""
    kind, cipher = CODECS[codec], MasterKey(bytes(32)).cipher("", "entry")
    turns = [spec.rotation for spec in model.specs]
    layers = [
        (kind.parts((x.keys.shape[0], x.keys.shape[2], x.values.shape[2]), kv.num_tokens, dtype), x)
        for x in (type(x)(x.keys.to(dtype), x.values.to(dtype)) for x in kv.layers)
    ]
    packed = [
        (parts, layout.layer_parts(kind.pack(x, turn)))
        for (parts, x), turn in zip(layers, turns, strict=True)
    ]
    size = sum(part.num_bytes for parts, _ in packed for part in parts)
    frames = [planes.compress(raw, parts) for parts, raw in packed]
    unsorted = [planes.zstandard().ZstdCompressor(level=1).compress(b"".join(raw)) for _, raw in packed]
    blobs = [cipher.seal(raw, "layer") for _, raw in packed]
    flat = [torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8) for _, raw in packed]
    seconds = {
        "compress": lambda: [planes.compress(raw, parts) for parts, raw in packed],
        "decompress": lambda: [
            planes.decompress(f, parts) for f, (parts, _) in zip(frames, packed, strict=True)
        ],
        "decrypt": lambda: [cipher.open(blob, "layer") for blob in blobs],
        "copy": lambda: [x.clone() for x in flat],
    }
    speeds = {name: size / best_of(runs, call) / 1e9 for name, call in seconds.items()}
    ratio = size / sum(map(len, frames))
    return {
        "codec": codec,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": size,
        "ratio": ratio,
        "ratio_unsorted": size / sum(map(len, unsorted)),
        **speeds,
        # Reading size / link beats size / ratio / link + size / decompress below this link.
        "pays_below": speeds["decompress"] * (1 - 1 / ratio),
    }


def reader_rows(num_tokens: int) -> tuple[Model, KV]:
    """The shipped reader over documents of its world."""
    model = Model.load(dtype="float32", device="cpu")
    text = "\n\n".join(document.text for document in World(0, held_out=True).documents(40))
    tokens = model.text.tokenize(text)[:num_tokens]
    return model, encode(model, [tokens])[0]


def shape_rows(shape: Shape, num_tokens: int) -> tuple[Model, KV]:
    """Random weights over random tokens."""
    model = build(shape, torch.float32, "cpu")
    tokens = tuple(torch.randint(10, shape.vocabulary, (num_tokens,)).tolist())
    return model, encode(model, [tokens])[0]


def main() -> None:
    """Print one JSON object per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    shape = Shape(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, head_dim=16, vocabulary=512)
    sources = {
        "reader": lambda: reader_rows(options.tokens),
        "0.5B shape, random weights": lambda: shape_rows(shape if options.smoke else Shape(), options.tokens),
    }
    for name, source in sources.items():
        model, kv = source()
        for codec, dtype in CASES:
            found = measured(kv, model, codec, dtype, 1 if options.smoke else options.runs)
            print(json.dumps({"rows": name, "tokens": kv.num_tokens, **found}))


if __name__ == "__main__":
    main()
