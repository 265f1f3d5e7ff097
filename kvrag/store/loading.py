"""Reading entries: mapped, verified, compared with what was asked for, and kept for the next time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from kvrag.errors import CacheMiss
from kvrag.segments import KV, LayerKV, LazyLayers
from kvrag.store import advice, layout
from kvrag.store.clock import StoreClock
from kvrag.store.counts import Counts
from kvrag.store.direct import DirectReads
from kvrag.store.folder import EntryFolder
from kvrag.store.kept import KeptEntries, Signature
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.lazy import MappedLayers
from kvrag.store.ledger import Ledger

logger = logging.getLogger(__name__)

_MAX_READS = 3


class Loader:
    """Reads entries by their files alone: neither lock nor index is asked.

    Args:
        folder: the entries' files.
        ledger: moves what is damaged aside.
        clock: the store's clock.
        counts: what is counted.
        verify: "load" or "never".
        keep_bytes: of verified files that stay mapped.
        direct: read whole entries past the page cache, where the file system can.
    """

    def __init__(
        self,
        folder: EntryFolder,
        ledger: Ledger,
        clock: StoreClock,
        counts: Counts,
        *,
        verify: Literal["load", "never"],
        keep_bytes: int,
        direct: bool = False,
    ) -> None:
        self.kept = KeptEntries(keep_bytes)
        self._folder = folder
        self._ledger = ledger
        self._clock = clock
        self._counts = counts
        self._verify = verify
        self._direct = DirectReads() if direct else None
        self._signature = folder.signature
        self._lost: dict[str, Signature] = {}

    def get(self, key: EntryKey, *, by_layer: bool) -> KV:
        """The entry's rows; see `DiskStore.get`.

        Raises:
            CacheMiss: absent, expired, damaged or foreign.
        """
        for _ in range(_MAX_READS):
            signature = self._signature(key.id)
            if signature is None or self._lost.get(key.id) == signature:
                break
            try:
                kept = self.kept.get(key.id, signature)
                if kept is None or (isinstance(kept.kv.layers, LazyLayers) and not by_layer):
                    kv = self._load(key, signature, by_layer=by_layer)
                else:
                    kv = kept.kv
                    if kept.expires is not None and kept.expires <= self._clock.now():
                        raise self._expired(key.id)
            except Damaged as damage:
                if self._signature(key.id) != signature:
                    continue  # it was being replaced while we read it
                self.set_aside(key.id, str(damage), signature)
                break
            return kv
        raise self._miss(key.id)

    def is_intact(self, key: EntryKey) -> bool:
        """Whether every byte of an entry is what it was, whatever its time to live."""
        signature = self._signature(key.id)
        if signature is None:
            return False
        try:
            self._load(key, signature, in_time=False)
        except Damaged:
            return False
        return True

    def is_over(self, manifest: Manifest) -> bool:
        """Whether its time to live is over; see `kvrag.store.clock` for why it matters when it was made."""
        return manifest.expires is not None and manifest.expires <= self._clock.at_least(manifest.created)

    def set_aside(self, key_id: str, reason: str, signature: Signature) -> None:
        """Count a damaged entry and move it out of the way, unless its files have changed since."""
        self._counts.add("damaged")
        logger.warning(
            "entry %s in %s is not usable and will be recomputed: %s", key_id[:12], self._folder.path, reason
        )
        try:
            with self._ledger.locked():
                if self._signature(key_id) == signature:
                    with self._ledger.changing([key_id]):
                        self._folder.set_aside(key_id)
        except OSError as error:
            logger.warning("it could not be moved aside: %s", error)

    def _load(
        self, key: EntryKey, signature: Signature, *, by_layer: bool = False, in_time: bool = True
    ) -> KV:
        """Map, verify and remember an entry; by layer only what lies around the rows is verified.

        Args:
            key: what to look for.
            signature: of its files.
            by_layer: leave the rows for later.
            in_time: refuse it if its time to live is over.

        Raises:
            Damaged: it is not what its manifest and this key say.
            CacheMiss: its time to live is over.
        """
        manifest, cipher = self._folder.revealed(key.id)
        fields = key.fingerprint.fields()
        if manifest.fingerprint != fields:
            other = {name: manifest.fingerprint.get(name) for name, v in fields.items()}
            raise Damaged(f"the entry was made for {other}, asked for was {fields}")
        if in_time and self.is_over(manifest):
            raise self._expired(key.id)
        data = self._data(self._folder.files(key.id)[1], manifest, by_layer=by_layer)
        if self._verify == "load":
            (layout.verify_frame if by_layer else layout.verify)(data, manifest)
        if layout.stored_tokens(data, manifest, cipher) != token_bytes(key.tokens):
            raise Damaged("the entry holds other tokens")
        layer = layout.reader(data, manifest, key, cipher)
        if by_layer:
            kv = self._by_layer(key, signature, data, manifest, layer)
        else:
            kv = KV(key.tokens, tuple(map(layer, range(len(manifest.layers)))))
            self._counts.add("bytes_read", sum(end - start for start, end in manifest.layer_spans()))
        self._keep(key.id, signature, manifest, kv)
        return kv

    def _data(self, file: Path, manifest: Manifest, *, by_layer: bool) -> torch.Tensor:
        """All bytes of a data file: mapped, or read if that was asked for; see `layout.map_file`."""
        if self._direct is not None and not by_layer:
            data = self._direct.read(file, manifest.file_size)
            if data is not None:
                return data
        data = layout.map_file(file, manifest)
        (advice.read_nothing_ahead if by_layer else advice.read_in_large_pages)(data)
        return data

    def _by_layer(
        self,
        key: EntryKey,
        signature: Signature,
        data: torch.Tensor,
        manifest: Manifest,
        layer: Callable[[int], LayerKV],
    ) -> KV:
        """The same rows, each layer verified, decoded and counted when it is first touched."""
        spans = list(manifest.layer_spans())

        def prove(number: int) -> LayerKV:
            start, end = spans[number]
            advice.read_soon(data, start, end)
            try:
                if self._verify == "load":
                    layout.verify_layer(data, manifest, number, (start, end))
                rows = layer(number)
            except Damaged as damage:
                self._lose(key.id, signature, damage)
                raise self._miss(key.id) from damage
            self._counts.add("bytes_read", end - start)
            return rows

        def finish() -> None:
            whole = KV(key.tokens, tuple(layers))
            self._keep(key.id, signature, manifest, whole)  # from now on like one loaded at once

        def read_soon(number: int) -> None:
            advice.read_soon(data, *spans[number])

        layers = MappedLayers(len(key.tokens), manifest.row_bytes(), prove, finish, read_soon)
        return KV(key.tokens, layers)

    def _keep(self, key_id: str, signature: Signature, manifest: Manifest, kv: KV) -> None:
        if self._signature(key_id) == signature:
            size = max(manifest.file_size, sum(manifest.row_bytes()))
            self.kept.keep(key_id, signature, kv, size, manifest.expires)

    def _lose(self, key_id: str, signature: Signature, damage: Damaged) -> None:
        """Set an entry aside that was handed out before, unless other files have taken its place."""
        if self._signature(key_id) != signature or self._lost.get(key_id) == signature:
            return
        self.set_aside(key_id, str(damage), signature)
        if self._signature(key_id) == signature:
            # A read-only store. Its header is intact: without this, who starts over would find it again.
            self._lost[key_id] = signature

    def _miss(self, key_id: str) -> CacheMiss:
        """Forget and count an entry that is not usable; the error to raise."""
        self.kept.drop(key_id)
        self._counts.add("misses")
        return CacheMiss(f"no usable entry {key_id[:12]} in {self._folder.path}")

    def _expired(self, key_id: str) -> CacheMiss:
        self._counts.add("expired")
        return self._miss(key_id)
