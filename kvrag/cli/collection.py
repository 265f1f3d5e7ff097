"""kvrag ls, rm, stats, reconcile: what is in the collection, and taking it out."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvrag.cli.opening import chosen_ids, load_engine, open_home
from kvrag.errors import InputError
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
    NamesArgument,
    ReceiptOption,
    TenantOption,
)
from kvrag.terminal import count, print_json, print_rows, progress_bar, size, stdout, tell

_SHOWN = 5


def list_documents(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the chunks of the collection.

    Example: kvrag ls --json
    """
    place = open_home(folder, chroma, collection, tenant)
    place.must_exist()
    with place.corpus() as corpus:
        records = sorted(corpus.documents(), key=lambda r: (str(r.metadata.get("source", "")), r.id))
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [(r.id, str(r.metadata.get("source", "")), " ".join(r.text.split())) for r in records]
    print_rows(("id", "source", "text"), rows)
    stdout().print(count(len(records), "chunk"))


def rm(
    names: NamesArgument,
    receipt: ReceiptOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove chunks by id, or all chunks of a source or file; their caches' bytes go with them.

    The receipt says what was erased, and where.

    Example: kvrag rm notes/old.md --receipt erased.json
    """
    place = open_home(folder, chroma, collection, tenant)
    place.must_exist()
    if receipt is not None and receipt.exists():
        raise InputError(f"{receipt} exists; receipts are never overwritten: choose another name")
    with place.corpus() as corpus:
        deletion = corpus.delete(chosen_ids(corpus, names))
        is_overwritten = corpus.forget()
    deletion = replace(deletion, entries=(*deletion.entries, *place.sweep()))
    result = {
        "removed": list(deletion.ids),
        "collection": deletion.collection,
        "texts_overwritten": is_overwritten,
        "erased": [asdict(entry) for entry in deletion.entries],
        "kept": list(deletion.kept),
        "num_bytes": deletion.num_bytes,
        "seconds": deletion.seconds,
    }
    if receipt is not None:
        _write(receipt, result)
    if as_json:
        print_json(result)
    else:
        _print_deletion(deletion, is_overwritten=is_overwritten)


def _write(file: Path, result: dict[str, Any]) -> None:
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"everything was erased, but the receipt {file} cannot be written: {error.strerror}"
        ) from error


def _print_deletion(deletion: Any, *, is_overwritten: bool) -> None:
    out = stdout()
    out.print(f"removed {count(len(deletion.ids), 'chunk')} with all caches ({size(deletion.num_bytes)})")
    where = (
        "and overwritten in Chroma's file" if is_overwritten else "and Chroma may hold their bytes a while"
    )
    out.print(
        f"  collection {deletion.collection}: {count(len(deletion.ids), 'text')} with metadata, {where}"
    )
    for entry in deletion.entries[:_SHOWN]:
        for place in entry.erased:
            out.print(f"  {place.replace(entry.key_id, entry.key_id[:12] + '…')}")
    if len(deletion.entries) > _SHOWN:
        out.print(f"  and {len(deletion.entries) - _SHOWN} more caches; --receipt FILE lists all of them")
    if deletion.kept:
        out.print(f"  {len(deletion.kept)} caches stay: other chunks have the same text")


def stats(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count chunks, entries and bytes.

    Example: kvrag stats
    """
    place = open_home(folder, chroma, collection, tenant)
    place.must_exist()
    settings = place.settings()
    with place.corpus() as corpus:
        counts = corpus.stats()
    with closing(place.store()) as store:
        pinned = loads = 0
        saved = 0.0
        for entry in store.entries():
            pinned += entry.num_bytes if entry.pinned else 0
            loads += entry.hits
            saved += entry.hits * entry.cost_seconds
    result = {
        "home": str(place.path),
        "model": settings.model,
        "chunks": counts.documents,
        "entries": counts.store.entries,
        "cache_bytes": counts.store.num_bytes,
        "pinned_bytes": pinned,
        "loads": loads,
        "saved_seconds": saved,
        "budget_bytes": settings.budget_bytes,
        "ttl_seconds": settings.ttl_seconds,
    }
    if as_json:
        print_json(result)
        return
    out = stdout()
    caches = f"{count(counts.store.entries, 'cache')}, {size(counts.store.num_bytes)}"
    out.print(f"{count(counts.documents, 'chunk')}, {caches}")
    out.print(f"model {settings.model}, folder {place.path}")
    if loads:
        out.print(f"loaded {loads} times; reading anew would have taken {saved:.1f} s")
    if pinned:
        out.print(f"{size(pinned)} pinned")
    if settings.budget_bytes is not None:
        out.print(f"budget {size(settings.budget_bytes)}")
    if settings.ttl_seconds is not None:
        out.print(f"caches live {settings.ttl_seconds / 86400:g} days")


def reconcile(
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make the caches what the collection says, after a crash or a change made elsewhere.

    Example: kvrag reconcile
    """
    place = open_home(folder, chroma, collection, tenant)
    place.must_exist()
    with (
        load_engine(place, model, device, dtype) as engine,
        place.corpus(engine) as corpus,
        progress_bar("reconciling") as progress,
    ):
        report = corpus.reconcile(progress=progress)
    if as_json:
        print_json(asdict(report))
        return
    mended = {k: v for k, v in asdict(report).items() if k not in ("records", "unencodable") and v}
    words = ", ".join(f"{count} {what}" for what, count in mended.items()) or "nothing to mend"
    stdout().print(f"{count(report.records, 'chunk')}: {words}")
    for name in report.unencodable:
        tell("warning", f"{name} cannot be read by this model (empty or too long)")
