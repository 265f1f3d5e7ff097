"""Writing entries so that a crash does not lose them, against dd with a sync of the same bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from store_parts.corpus import best, dd, filled, medians, rounds, timed
from store_parts.reading import Entries, save_safetensors, save_torch

from kvrag.segments import KV
from kvrag.store.disk import DiskStore


def measure(folder: Path, entries: Entries, repeat: int) -> dict[str, object]:
    """Seconds of each side, medians and least; every side ends with the bytes on the disk."""
    source = folder / "source"
    with source.open("xb") as file:
        for path in filled(folder / "filled", entries):
            file.write(path.read_bytes())
    shutil.rmtree(folder / "filled")
    num_bytes = source.stat().st_size
    sides: dict[str, Callable[[Path], object]] = {
        "dd": lambda to: dd(f"if={source}", f"of={to / 'all'}", "conv=fsync"),
        "store": lambda to: DiskStore(to).put_many(entries),
        "store_one_by_one": lambda to: _one_by_one(to, entries),
        "torch": lambda to: _files(to, entries, save_torch),
        "safetensors": lambda to: _files(to, entries, save_safetensors),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for name, write in rounds(sides, repeat):
        source.read_bytes()  # stays in memory: dd is to write, not to read
        target = folder / "target"
        target.mkdir()
        os.sync()
        found[name].append(timed(partial(write, target)))
        shutil.rmtree(target)
    return {"bytes": num_bytes, "synced": medians(found), "synced_best": best(found)}


def _one_by_one(folder: Path, entries: Entries) -> None:
    store = DiskStore(folder)
    for key, kv in entries:
        store.put(key, kv)


def _files(folder: Path, entries: Entries, save: Callable[[KV, Path], None]) -> None:
    for number, (_, kv) in enumerate(entries):
        path = folder / str(number)
        save(kv, path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
