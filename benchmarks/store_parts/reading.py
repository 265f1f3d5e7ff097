"""Reading the store's entries against dd of the same bytes, and files of torch.save and safetensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from store_parts.corpus import Side, best, dd, filled, forget, medians, rounds, timed, touch

from kvrag.segments import KV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.several import get_many

Entries = list[tuple[EntryKey, KV]]


def tensors_of(kv: KV) -> dict[str, torch.Tensor]:
    """One tensor of keys and one of values per layer, as research code keeps them."""
    layers = enumerate(kv.layers)
    return {
        f"{number}.{what}": getattr(layer, what) for number, layer in layers for what in ("keys", "values")
    }


def save_torch(kv: KV, path: Path) -> None:
    """As TurboRAG (arXiv:2410.07590) keeps its caches."""
    torch.save(tensors_of(kv), path)


def load_torch(path: Path) -> int:
    """Load and touch."""
    return touch(torch.load(path, weights_only=True).values())


def save_safetensors(kv: KV, path: Path) -> None:
    """One tensor for keys and one for values per layer."""
    save_file(tensors_of(kv), path)


def load_safetensors(path: Path) -> int:
    """Load and touch."""
    return touch(load_file(path).values())


def measure(folder: Path, entries: Entries, repeat: int) -> dict[str, object]:
    """Seconds of each side with pages dropped ("cold") and in memory ("warm"), medians and least."""
    data = filled(folder / "store", entries)
    whole = folder / "dd" / "all"
    whole.parent.mkdir()
    with whole.open("xb") as file:
        for path in data:
            file.write(path.read_bytes())
    sides: dict[str, tuple[Path, Side]] = {
        "dd": (whole.parent, lambda: dd(f"if={whole}", "of=/dev/null")),
        "dd_direct": (whole.parent, lambda: dd(f"if={whole}", "of=/dev/null", "iflag=direct")),
        **_of_the_store(folder / "store", [key for key, _ in entries]),
        "torch": _of_files(folder / "torch", entries, save_torch, load_torch),
        "safetensors": _of_files(folder / "safetensors", entries, save_safetensors, load_safetensors),
    }
    cold: dict[str, list[float]] = {name: [] for name in sides}
    warm: dict[str, list[float]] = {name: [] for name in sides}
    for name, (files, read) in rounds(sides, repeat):
        forget(files)
        cold[name].append(timed(read))
        warm[name].append(timed(read))
    return {
        "bytes": whole.stat().st_size,
        "cold": medians(cold),
        "cold_best": best(cold),
        "warm": medians(warm),
        "warm_best": best(warm),
    }


def _of_the_store(folder: Path, keys: list[EntryKey]) -> dict[str, tuple[Path, Side]]:
    """The ways to read entries; each begins with closed files and verifies every byte."""

    def one_by_one() -> None:
        store = DiskStore(folder)
        for key in keys:
            store.get(key)

    def by_layer(ahead: bool) -> None:
        """All documents' layer 0, then their layer 1, as an answer reads them."""
        found = get_many(DiskStore(folder), keys, by_layer=True).values()
        for number in range(len(next(iter(found)).layers)):
            for kv in found:
                kv.layers[number]
                if ahead and number + 1 < len(kv.layers):
                    kv.read_soon(number + 1)

    return {
        "store": (folder, lambda: get_many(DiskStore(folder), keys)),
        "store_one_by_one": (folder, one_by_one),
        "store_by_layer": (folder, functools.partial(by_layer, True)),
        "store_by_layer_no_look_ahead": (folder, functools.partial(by_layer, False)),
        "store_direct": (folder, lambda: get_many(DiskStore(folder, direct=True), keys)),
    }


def _of_files(
    folder: Path, entries: Entries, save: Callable[[KV, Path], None], load: Callable[[Path], int]
) -> tuple[Path, Side]:
    folder.mkdir()
    files = [folder / str(number) for number in range(len(entries))]
    for (_, kv), path in zip(entries, files, strict=True):
        save(kv, path)

    def read() -> None:
        for path in files:
            load(path)

    return folder, read
