"""The stores of an engine: opened by a few words, and read ahead for its answers."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from kvrag.config import store_key
from kvrag.errors import ConfigError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.memory import MemoryTier
from kvrag.store.objects import ObjectStore
from kvrag.store.prefetch import Fetch
from kvrag.store.sealing import MasterKey
from kvrag.store.tiers import TieredStore

KEY_VERSION = 2
"""Of what is encrypted and no cache: it cannot be read anew when the layout of caches changes."""


def open_store(
    store: KVStore | str | Path | None,
    *,
    memory_bytes: int | None = None,
    objects: str | ObjectStore | None = None,
    budget_bytes: int | None = None,
    device: torch.device | None = None,
) -> KVStore | None:
    """A store, or several behind each other: memory, a folder, a bucket.

    Entries are written to the folder first and to the bucket in the background. With KVRAG_STORE_KEY in the
    environment, folder and bucket are encrypted.

    Args:
        store: a store, a folder for one, or None.
        memory_bytes: of a tier in memory, on `device`; None: there is none.
        objects: a bucket, or the URL of one, which is asked for once; None: there is none.
        budget_bytes: of the folder; None: no limit.
        device: where the model is.

    Raises:
        ConfigError: a limit without a folder, memory in front of nothing, or an impossible number; a bucket
            that does not exist or refuses these credentials. (One that does not answer is tried again later.)
        MissingExtra: a bucket needs `kvrag[objects]`, on S3 `kvrag[s3]`.
    """
    if budget_bytes is not None and not isinstance(store, (str, Path)):
        raise ConfigError("budget_bytes is what a folder may take; expected store='folder' with it")
    key = store_key()
    lasting: list[KVStore] = [] if store is None or isinstance(store, (str, Path)) else [store]
    if isinstance(store, (str, Path)):
        lasting.append(DiskStore(store, key=key, budget_bytes=budget_bytes))
    if isinstance(objects, str):
        bucket = ObjectStore(objects, master_key=key)
        bucket.probe()
        lasting.append(bucket)
    elif objects is not None:
        lasting.append(objects)
    if not lasting and memory_bytes is not None:
        raise ConfigError("memory_bytes is a tier in front of others; expected store= or objects= with it")
    front: list[KVStore] = [] if memory_bytes is None else [MemoryTier(memory_bytes, device=device)]
    if len(front) + len(lasting) > 1:
        return TieredStore([*front, *lasting], write="back" if len(lasting) > 1 else "through")
    return lasting[0] if lasting else None


def key_of(store: object) -> MasterKey | None:
    """What belongs to a store's entries, such as saved sessions, is encrypted with: its key.

    Where there is no store, or one that has none, that is KVRAG_STORE_KEY; None: nothing is encrypted.

    Raises:
        ConfigError: the store is encrypted, with another key or without one given here.
        MissingExtra: encryption needs `kvrag[encrypt]`.
    """
    key: MasterKey | None = getattr(store, "master_key", None)
    if key is None and (raw := store_key()) is not None:
        key = MasterKey(raw)
    return None if key is None else key.of_version(KEY_VERSION)


class Ahead:
    """Documents that are being loaded for an answer; ends when it is closed, left or let go of."""

    def __init__(self, *fetches: Fetch | None) -> None:
        """Hold what was begun."""
        begun = [fetch for fetch in fetches if fetch is not None]
        self._finalizer = weakref.finalize(self, _close, begun)

    def close(self) -> None:
        """Nothing of it is needed any more."""
        self._finalizer()

    def __enter__(self) -> Ahead:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _close(fetches: list[Fetch]) -> None:
    for fetch in fetches:
        fetch.close()
