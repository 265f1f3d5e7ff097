"""Reading entries out of a bucket: whole, or each layer when it is touched."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from kvrag.errors import CacheMiss
from kvrag.segments import KV, LayerKV
from kvrag.store import layout
from kvrag.store.bucket import Bucket
from kvrag.store.bucket_trouble import BucketTrouble
from kvrag.store.filters import Filters
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.lazy import FetchedLayers
from kvrag.store.opened import OpenedObject, object_name

_AHEAD = 4  # layers under way at once: a request takes about as long for one as for none


class Fetching:
    """Fetches, verifies and decodes.

    Args:
        bucket: the objects.
        filters: with the key that entries are encrypted with.
        trouble: where what goes wrong is counted.
        verify: check every byte that is fetched.
    """

    def __init__(self, bucket: Bucket, filters: Filters, trouble: BucketTrouble, *, verify: bool) -> None:
        self._bucket, self._filters, self._trouble, self._verify = bucket, filters, trouble, verify
        self._lock = threading.Lock()
        self._lent: dict[str, weakref.WeakSet[FetchedLayers]] = {}

    def rows(self, key: EntryKey, *, by_layer: bool) -> KV:
        """Fetch and verify an entry; by layer only what lies around the rows.

        Raises:
            Damaged: it is not what its manifest and this key say.
            CacheMiss: its time is over.
        """
        opened = OpenedObject(self._bucket, object_name(key.id))
        frame, fields = opened.frame, key.fingerprint.fields()
        if self._trouble.lost.get(key.id) == opened.raw_manifest:
            raise Damaged("it was found damaged before")
        if frame.expires is not None and frame.expires <= time.time():
            raise self._trouble.miss(key.id, "its time to live is over")
        manifest, cipher = layout.reveal(opened.manifest, self._filters)
        if manifest.id != key.id:
            raise Damaged(f"the entry belongs to another name, {manifest.id[:12]}")
        if manifest.fingerprint != fields:
            other = {name: manifest.fingerprint.get(name) for name, v in fields.items()}
            raise Damaged(f"the entry was made for {other}, asked for was {fields}")
        spans = list(manifest.layer_spans())
        if by_layer:
            opened.fetch(0, manifest.data_start)
            opened.fetch(spans[-1][1] if spans else manifest.data_start, manifest.file_size)
        else:
            opened.fetch(0, manifest.file_size)
        if self._verify:
            (layout.verify_frame if by_layer else layout.verify)(opened.data, manifest)
        if layout.stored_tokens(opened.data, manifest, cipher) != token_bytes(key.tokens):
            raise Damaged("the entry holds other tokens")
        layer = layout.reader(opened.data, manifest, key, cipher)
        if by_layer:
            return self._by_layer(key, opened, manifest, layer)
        self._trouble.count("bytes_read", sum(end - start for start, end in spans))
        return KV(key.tokens, tuple(map(layer, range(len(spans)))))

    def fetch_lent(self, key_id: str) -> None:
        """Fetch what was handed out of an entry and not yet touched: the object is going to be removed."""
        with self._lock:
            lent = list(self._lent.pop(key_id, ()))
        for layers in lent:
            with suppress(CacheMiss):  # whoever holds it finds out when touching it
                tuple(layers)

    def _by_layer(
        self, key: EntryKey, opened: OpenedObject, manifest: Manifest, layer: Callable[[int], LayerKV]
    ) -> KV:
        """The same rows, each layer fetched, verified and counted when it is first touched."""
        spans = list(opened.manifest.layer_spans())

        def prove(number: int) -> LayerKV:
            start, end = spans[number]
            try:
                opened.fetch(start, end)
                if self._verify:
                    layout.verify_layer(opened.data, opened.manifest, number, (start, end))
                rows = layer(number)
            except Damaged as damage:
                self._trouble.lose(key.id, damage, unless_changed=opened.raw_manifest)
                raise self._trouble.miss(key.id, str(damage)) from damage
            except Exception as error:
                raise self._trouble.unread(key.id, error) from error
            self._trouble.count("bytes_read", end - start)
            return rows

        sizes = manifest.row_bytes()
        layers = FetchedLayers(len(key.tokens), sizes, prove, ahead=_AHEAD)
        with self._lock:
            self._lent.setdefault(key.id, weakref.WeakSet()).add(layers)
            for key_id in [k for k, lent in self._lent.items() if not lent]:
                del self._lent[key_id]
        return KV(key.tokens, layers)
