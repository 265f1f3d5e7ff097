"""Documents' caches to store, the same bytes for everybody, and files that the system is to forget."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import TypeVar

import torch

from kvrag.segments import KV, LayerKV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import example_fingerprint

Side = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to store: by default the caches of a 0.5B-class model in float32."""

    documents: int = 16
    tokens: int = 512
    layers: int = 24
    kv_heads: int = 2
    head_dim: int = 64


SMOKE = Size(documents=3, tokens=32, layers=2)


def make(size: Size) -> list[tuple[EntryKey, KV]]:
    """Random rows: nothing that a disk could compress."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        return torch.randn(size.kv_heads, size.tokens, size.head_dim, generator=generator)

    found = []
    for number in range(size.documents):
        tokens = tuple(range(number, number + size.tokens))
        kv = KV(tokens, tuple(LayerKV(rows(), rows()) for _ in range(size.layers)))
        found.append((EntryKey(example_fingerprint(), tokens), kv))
    return found


def filled(folder: Path, entries: list[tuple[EntryKey, KV]]) -> list[Path]:
    """The data files of a store with these entries."""
    store = DiskStore(folder)
    store.put_many(entries)
    store.close()
    return sorted(folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of all files below, so that the next read comes from the disk.

    Mappings have to be gone by then, which cycles of closures may keep.
    """
    gc.collect()
    os.sync()  # pages that are not written yet would stay
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def touch(tensors: Iterable[torch.Tensor]) -> int:
    """Read a byte of every page, for those who load without looking at what they load."""
    return sum(int(t.reshape(-1).view(torch.uint8)[::4096].sum()) for t in tensors)


def dd(*arguments: str) -> None:
    """Run dd with blocks of four megabytes."""
    subprocess.run(["dd", "bs=4M", *arguments], check=True, stderr=subprocess.DEVNULL)


def timed(function: Side) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds(sides: Mapping[str, T], repeat: int) -> Iterator[tuple[str, T]]:
    """All sides `repeat` times, in another order each time: none always meets the traces of the same one."""
    order = Random(0)
    for _ in range(repeat):
        yield from order.sample(list(sides.items()), len(sides))


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each list."""
    return {name: median(values) for name, values in found.items()}


def best(found: Mapping[str, list[float]]) -> dict[str, float]:
    """The least of each list: what others on the machine disturbed least."""
    return {name: min(values) for name, values in found.items()}
