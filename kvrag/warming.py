"""Building the entries that a collection lacks, also one that somebody else has filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from kvrag.contexts import Contexts
from kvrag.index import Index
from kvrag.lockstep import Lockstep, Progress
from kvrag.reports import WarmReport
from kvrag.store.base import KVStore

Order = Callable[[str, int], Any]
"""The place of a document among those to be read first, from its text and its number of tokens."""

_Row = tuple[Any, int, str]  # place, number of tokens, id


def warm(
    lockstep: Lockstep,
    index: Index,
    store: KVStore,
    contexts: Contexts,
    *,
    only_missing: bool,
    order: Order | None,
    room: Callable[[], int | None] | None,
    progress: Progress | None,
) -> WarmReport:
    """Build what is missing, in order; see `Corpus.warm`, whose lock the caller holds."""
    if not only_missing:
        index.begin_writing()
        store.check(fix=True)
        lockstep.prepare_contexts()
    before = store.stats().num_bytes
    unencodable: list[str] = []
    missing, num_records = _missing(
        lockstep, index, store, contexts, order, unencodable, label=not only_missing
    )
    tokens = built = 0
    total, is_full = sum(length for _, length, _ in missing), False
    start = 0
    while start < len(missing):
        rows = missing[start : start + lockstep.batch_size]
        if room is not None:
            rows = rows[: _fitting(room(), rows, store.stats().num_bytes - before, tokens)]
        if not rows:
            is_full = True
            break
        start += len(rows)
        items = contexts.items(index.get([record for _, _, record in rows]), [])
        entries = store.stats().entries
        made = lockstep.build(items, label=not only_missing)
        built += made
        if room is not None and store.stats().entries < entries + made:
            # The first one, whose size nobody knew, was larger than the room: another one went.
            is_full = True
            break
        tokens += sum(length for _, length, _ in rows)
        if progress is not None:
            progress(tokens, total)
    return WarmReport(
        records=num_records,
        built=built,
        known=num_records - len(missing) - len(unencodable),
        unencodable=tuple(unencodable),
        num_bytes=store.stats().num_bytes - before,
        is_full=is_full,
    )


def _missing(
    lockstep: Lockstep,
    index: Index,
    store: KVStore,
    contexts: Contexts,
    order: Order | None,
    unencodable: list[str],
    *,
    label: bool,
) -> tuple[list[_Row], int]:
    """What lacks an entry, the first to be built first, and how many there are; others get references."""
    missing: list[_Row] = []
    num_records = 0
    for batch in contexts.batches(list(index.records()), lockstep.batch_size):
        items = contexts.items(batch, unencodable)
        there = [item for item in items if item.key in store]
        known = {item.id for item in there}
        num_records += len(batch)
        for item in items:
            if item.id not in known:
                length = len(item.key.tokens)
                missing.append((0 if order is None else order(item.text, length), length, item.id))
        lockstep.build(there, label=label)
    missing.sort(key=lambda row: row[0])
    return missing, num_records


def _fitting(room: int | None, rows: Sequence[_Row], num_bytes: int, num_tokens: int) -> int:
    """How many of the rows fit into the room, by what a token took so far; the very first is tried alone."""
    if room is None:
        return len(rows)
    if not num_tokens:
        return int(room > 0)
    needed = accumulate(length * num_bytes / num_tokens for _, length, _ in rows)
    return sum(total <= room for total in needed)
