"""kvrag: documents from the store's closed files, every byte verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peers_parts.asked import Clock, Pool, Request, Took

from kvrag.config import Sampling
from kvrag.decode import Behind, choice, steps
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, read
from kvrag.segments import KV, Segment, SegmentTable
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.several import get_many


class Ours:
    """A store of the pool's documents, and answers from it.

    Attributes:
        network: of transformers, the same that others use.
    """

    def __init__(
        self, model: Model, folder: Path, pool: Pool, rows: Sequence[KV], *, codec: str = "raw"
    ) -> None:
        """Put all documents into a store."""
        self.network = model.network
        self._model, self._folder, self._pool = model, folder, pool
        fingerprint = model.fingerprint(codec=codec)
        self._keys = [EntryKey(fingerprint, tokens) for tokens in pool.documents]
        store = DiskStore(folder)
        store.put_many(list(zip(self._keys, rows, strict=True)))
        store.close()

    @property
    def num_bytes(self) -> int:
        """Of all files of rows."""
        return sum(path.stat().st_size for path in self._folder.rglob("*.safetensors"))

    @torch.inference_mode()
    def first(self, request: Request) -> tuple[SegmentTable, FreshRows, Read]:
        """Open the store, load and verify every document, read the question."""
        keys = [self._keys[number] for number in request.documents]
        found = get_many(DiskStore(self._folder), keys, by_layer=True)
        length = self._pool.document_tokens
        table = SegmentTable(
            tuple(Segment(found[key.id], i * length, document=i) for i, key in enumerate(keys))
        )
        fresh = FreshRows(self._model.num_layers)
        end = length * len(keys)
        positions = range(end, end + len(request.question))
        return table, fresh, read(self._model, table, request.question, positions, fresh)

    @torch.inference_mode()
    def ask(self, request: Request, new_tokens: int) -> Took:
        """Load, read the question, choose tokens as the engine does."""
        prompt = self._pool.prompt(request)
        clock = Clock()
        table, fresh, last = self.first(request)
        chosen = choice(self._model, prompt, Sampling(max_new_tokens=new_tokens, ignore_eos=True))
        behind = Behind(table.seen_from(fresh.num_rows), fresh, self._model.specs)
        documents = tuple(segment.document for segment in table)
        tokens = steps(self._model, behind, prompt, last, documents, chosen, position=len(prompt))
        token = next(tokens).token
        clock.first()
        more = len(list(tokens))
        clock.last()
        return clock.took(more, len(prompt) - len(request.question), token)
