"""What things take here: measured once, kept beside the store, and corrected by what really happens."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import xxhash

from kvrag.costs import CostTable, PrefillSpeed, Rate
from kvrag.encoding import Run, encode_runs
from kvrag.errors import ConfigError
from kvrag.model import Model
from kvrag.store import advice
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.files import PARTIAL, commit, remove, write_partial
from kvrag.store.found import Place
from kvrag.store.key import tagged_digest
from kvrag.store.prefetch import Prefetch
from kvrag.store.tiers import TieredStore

logger = logging.getLogger(__name__)

FILE = "costs.json"
_MAX_KEPT = 32  # machines and models that share a store
_SHORT, _LONG, _LONG_SECONDS = 64, 512, 0.2
_DISK_BYTES, _NUM_SMALL = 8 << 20, 4
_LINK_BYTES = 16 << 20
# Nothing is measured for answers that load so little that there is nothing to be won on any machine.
_SLOW = {"disk": Rate(2e8, 1e-3)}
_FAR = Rate(2e7, 3e-2)
_WORTH_SECONDS = 0.025


class Speeds:
    """A table of costs of one model, store and machine.

    Any thread may read and correct it; only the one that owns the model may measure.

    Args:
        model: what reads.
        store: what rows come from.
        table: taken as it is, neither measured nor corrected nor kept; None: found out.
    """

    def __init__(self, model: Model, store: KVStore | None, table: CostTable | None = None) -> None:
        self._model = model
        self._disk = disk_of(store)
        self._is_fixed = table is not None
        self._table = table
        self._has_changed = False
        self._lock = threading.Lock()

    @property
    def table(self) -> CostTable:
        """What is known now."""
        with self._lock:
            if self._table is None:
                self._table = self._kept()
            return self._table

    def are_wanted(self, places: Sequence[Place], sizes: Sequence[int]) -> bool:
        """Whether documents would take so long to load, from a slow place, that measuring pays."""
        if self._is_fixed or self.table.prefill is not None:
            return False
        slow = 0.0
        for place, size in zip(places, sizes, strict=True):
            if not place.is_at_hand:
                rate = self.table.tiers.get(place.tier) or _SLOW.get(place.tier, _FAR)
                slow += rate.seconds(size)
        return slow > _WORTH_SECONDS

    def measure(self) -> CostTable:
        """Find out how fast disk, link and model are; some tenths of a second.

        Buckets are not measured: what loads from them take is noted when they happen.
        """
        if self._is_fixed:
            return self.table
        disk = None if self._disk is None else disk_rate(self._disk.path)
        found = replace(
            self.table,
            prefill=prefill_speed(self._model),
            link=link_rate(self._model.device),
            tiers=MappingProxyType({**self.table.tiers, **({} if disk is None else {"disk": disk})}),
        )
        self._set(found)
        self.save()
        return found

    def note_load(self, tier: str, num_bytes: int, entries: int, seconds: float) -> None:
        """Correct the rate of a tier by what loading took."""
        if self._is_fixed or not num_bytes:
            return
        known = self.table.tiers.get(tier)
        rate = (
            Rate.first(num_bytes, entries, seconds)
            if known is None
            else known.after(num_bytes, entries, seconds)
        )
        self._set(replace(self.table, tiers=MappingProxyType({**self.table.tiers, tier: rate})))

    def note_prefill(self, before: int, tokens: int, seconds: float) -> None:
        """Correct the model's speed by what reading took, if it was measured."""
        speed = self.table.prefill
        if not self._is_fixed and speed is not None and tokens:
            self._set(replace(self.table, prefill=speed.after(before, tokens, seconds)))

    def note_size(self, token_bytes: float) -> None:
        """Note how many bytes a token's rows have in the store."""
        if not self._is_fixed and token_bytes and not self.table.token_bytes:
            self._set(replace(self.table, token_bytes=token_bytes))

    def _set(self, table: CostTable) -> None:
        with self._lock:
            self._table, self._has_changed = table, True

    # --- the file ---

    def save(self) -> None:
        """Keep what is known beside the store, if it is a folder that exists; a failure is only logged."""
        if self._disk is None or not self._has_changed or self.table.prefill is None:
            return
        file = self._disk.path / FILE
        partial = file.with_name(f"costs.{os.getpid()}{PARTIAL}")
        kept = {name: raw for name, raw in _read(file).items() if name != self._key}
        kept = dict(list(kept.items())[-(_MAX_KEPT - 1) :]) | {self._key: self.table.as_dict()}
        try:
            if self._disk.path.is_dir():
                write_partial(partial, [json.dumps(kept, indent=1).encode()])
                commit(partial, file)
                self._has_changed = False
        except OSError as error:
            logger.debug("%s is not kept: %s", file, error)

    def _kept(self) -> CostTable:
        """The table of an earlier process on this machine, or an empty one."""
        if self._disk is None or not (self._disk.path / FILE).exists():
            return CostTable()
        try:
            return CostTable.from_dict(_read(self._disk.path / FILE)[self._key])
        except (ConfigError, LookupError, TypeError, ValueError, AttributeError):
            return CostTable()  # of another machine, or no table at all: measured when it is needed

    @property
    def _key(self) -> str:
        """What speeds depend on beside the store: model, element type, device, threads, machine."""
        device = self._model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        of_model = self._model.fingerprint()
        fields: dict[str, str | int | bytes] = {
            "model": of_model.model,
            "dtype": of_model.dtype,
            "device": name,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()}",
        }
        return tagged_digest(fields)[:32]


def _read(file: Path) -> dict[str, Any]:
    """What the file holds, by key; nothing if it cannot be read."""
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def disk_of(store: object) -> DiskStore | None:
    """The folder among a store's tiers, if there is one."""
    if isinstance(store, Prefetch):
        return disk_of(store.store)
    if isinstance(store, TieredStore):
        return store.disk
    return store if isinstance(store, DiskStore) else None


# --- measuring ------------------------------------------------------------------------------------


def prefill_speed(model: Model) -> PrefillSpeed:
    """What reading a short and a longer text takes: the second as long as it is read in about 0.2 s."""
    short = max(1, min(_SHORT, model.max_length // 4))
    _reading_seconds(model, short)  # what is only slow the first time
    seconds = min(_reading_seconds(model, short) for _ in range(2))
    affordable = int(short * _LONG_SECONDS / seconds)
    longer = max(2 * short, min(_LONG, model.max_length - 1, affordable))
    return PrefillSpeed((short, seconds), (longer, _reading_seconds(model, longer)))


def _reading_seconds(model: Model, num_tokens: int) -> float:
    vocabulary = int(model.network.config.get_text_config(decoder=True).vocab_size)
    run = Run(tuple(i % vocabulary for i in range(num_tokens)), ((0, num_tokens),))
    _wait(model.device)
    start = time.perf_counter()
    encode_runs(model, [run], token_budget=num_tokens)
    _wait(model.device)
    return max(time.perf_counter() - start, 1e-6)


def link_rate(device: torch.device) -> Rate | None:
    """How fast rows get from main memory to a device; None where they are there."""
    if device.type == "cpu":
        return None
    rows = torch.zeros(_LINK_BYTES, dtype=torch.uint8)
    seconds = []
    for size in (1, 1, _LINK_BYTES, _LINK_BYTES):  # each of them a first time, which does not count
        _wait(device)
        start = time.perf_counter()
        rows[:size].to(device)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return Rate(_LINK_BYTES / max(seconds[3] - seconds[1], 1e-6), seconds[1])


def disk_rate(folder: Path) -> Rate | None:
    """How fast files come from a folder's disk, past what memory has of them; None: it cannot be written."""
    files = [folder / f"costs.{os.getpid()}.{i}{PARTIAL}" for i in range(_NUM_SMALL + 1)]
    try:
        write_partial(files[0], [os.urandom(_DISK_BYTES)])
        for file in files[1:]:
            write_partial(file, [os.urandom(4096)])
        large = _loading_seconds(files[0])
        latency = sum(map(_loading_seconds, files[1:])) / _NUM_SMALL
    except OSError as error:
        logger.debug("the speed of %s is not known: %s", folder, error)
        return None
    finally:
        for file in files:
            remove(file)
    return Rate(_DISK_BYTES / max(large - latency, 1e-6), latency)


def _loading_seconds(file: Path) -> float:
    """What mapping a file and proving its bytes takes, as loads do it."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    start = time.perf_counter()
    size = file.stat().st_size
    data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    advice.read_in_large_pages(data)
    xxhash.xxh3_128_digest(data.numpy().data)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
