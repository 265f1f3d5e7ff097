"""Time to the first token: caches from the disk against caches in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from store_parts.corpus import best, forget, medians, timed
from ttft import SMOKE, Shape, build

from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.segments import Segment, SegmentTable
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore
from kvrag.store.several import get_many, put_many

QUESTION = 32


class Asked:
    """A model, documents in two stores, and a question."""

    def __init__(self, folder: Path, shape: Shape, documents: int, tokens: int) -> None:
        self.model: Model = build(shape, torch.float32, "cpu")
        self.folder = folder
        generator = torch.Generator().manual_seed(1)

        def draw(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(5, shape.vocabulary, (count,), generator=generator).tolist())

        self.question, self.end = draw(QUESTION), documents * tokens
        fingerprint = self.model.fingerprint()
        self.keys = [EntryKey(fingerprint, draw(tokens)) for _ in range(documents)]
        rows = encode(self.model, [key.tokens for key in self.keys])
        self.memory = MemoryStore()
        for store in (self.memory, DiskStore(folder)):
            put_many(store, list(zip(self.keys, rows, strict=True)))

    @torch.inference_mode()
    def answer(self, store: KVStore, *, by_layer: bool = False) -> int:
        """The first token."""
        found = get_many(store, self.keys, by_layer=by_layer)
        segments, at = [], 0
        for number, key in enumerate(self.keys):
            segments.append(Segment(found[key.id], at, document=number))
            at += len(key.tokens)
        return self.first_token(SegmentTable(tuple(segments)))

    @torch.inference_mode()
    def first_token(self, table: SegmentTable) -> int:
        """Read the question behind a table."""
        positions = range(self.end, self.end + QUESTION)
        fresh = FreshRows(self.model.num_layers)
        return int(read(self.model, table, self.question, positions, fresh).logits[-1].argmax())


def measure(folder: Path, repeat: int, *, smoke: bool) -> dict[str, object]:
    """Seconds to the first token from memory, warm and cold files, whole and by layer."""
    shape = SMOKE if smoke else replace(Shape(), hidden=512, inner=1408, heads=8)
    documents, tokens = (2, 32) if smoke else (8, 512)
    asked = Asked(folder / "asked", shape, documents, tokens)
    found: dict[str, list[float]] = {}

    def take(name: str, *, by_layer: bool, cold: bool) -> None:
        if cold:
            forget(asked.folder)
        store = DiskStore(asked.folder)
        found.setdefault(name, []).append(timed(lambda: asked.answer(store, by_layer=by_layer)))

    asked.answer(asked.memory)
    for _ in range(repeat):
        found.setdefault("question_alone", []).append(timed(lambda: asked.first_token(SegmentTable())))
        found.setdefault("memory", []).append(timed(lambda: asked.answer(asked.memory)))
        for cold in (True, False):
            state = "cold" if cold else "warm"
            take(f"disk_{state}", by_layer=False, cold=cold)
            take(f"disk_by_layer_{state}", by_layer=True, cold=cold)
    size = sum(path.stat().st_size for path in asked.folder.rglob("*.safetensors"))
    made = {"documents": documents, "tokens": tokens, "question": QUESTION, "bytes": size}
    made |= {"layers": shape.layers, "hidden": shape.hidden}
    return {"model": made, "seconds": medians(found), "seconds_best": best(found)}
