"""kvrag ingest, warm: documents are read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from kvrag.cli.opening import (
    fit_codec,
    load_engine,
    load_texts,
    open_home,
    pin_entries,
    remember,
    warn_of_reader,
)
from kvrag.config import Context
from kvrag.errors import InputError
from kvrag.options import (
    BudgetOption,
    ByParagraphOption,
    ChromaOption,
    ChunkTokensOption,
    CodecOption,
    CollectionOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
    PathsArgument,
    PinOption,
    TenantOption,
    TtlOption,
    parse_seconds,
)
from kvrag.terminal import count, print_json, progress_bar, size, stderr, stdout, tell, token_bar


def ingest(
    paths: PathsArgument,
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    chunk_tokens: ChunkTokensOption = 512,
    by_paragraph: ByParagraphOption = False,
    context: ContextOption = None,
    codec: CodecOption = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Take the smallest codec that loses at most so many nats on these documents; with --codec "
            "auto on sample prompts.",
            min=0.0,
            metavar="NATS",
        ),
    ] = None,
    ttl: TtlOption = None,
    budget: BudgetOption = None,
    pin: PinOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read documents once: into the collection, and as KV caches into the store.

    Run again after a change, or after an interruption: chunks that are there are kept, and those that a file
    no longer has are removed. (Of files that are gone altogether, kvrag rm removes them.)

    Example: kvrag ingest notes/ report.pdf --model Qwen/Qwen2.5-7B-Instruct
    """
    from kvrag import home as homes  # noqa: PLC0415

    if codec not in (None, "auto") and max_kl is not None:
        raise InputError(
            "--codec names the codec and --max-kl chooses one; give one of them, or --codec auto"
        )
    chosen = None if context is None else Context.parse(context)
    place = open_home(folder, chroma, collection, tenant)
    remember(place, ttl=ttl, budget=budget)
    texts, others = load_texts(paths)
    limit = max_kl if codec == "auto" else None
    with load_engine(place, model, device, dtype, codec=codec, max_kl=limit) as engine:
        warn_of_reader(engine, place)
        if codec == "auto":
            stderr().print(f"codec {engine.codec}, of those measured on this model")
        elif max_kl is not None:
            fit_codec(engine, place, [document.text for document in texts], chunk_tokens, max_kl)
        with progress_bar("reading") as progress:
            report = homes.ingest(
                place,
                engine,
                texts,
                chunk_tokens=chunk_tokens,
                by_paragraph=by_paragraph,
                context=chosen,
                progress=progress,
            )
        with place.corpus(engine) as corpus:
            if ttl is not None:  # also for those that were there
                for entry in set(corpus.entries_of(report.ids).values()):
                    engine.store.expire(entry, parse_seconds(ttl))
            lacking = pin_entries(corpus, engine.store, list(report.ids)) if pin else []
        stats = engine.store.stats()
    result = {
        "documents": len(texts),
        "chunks": len(report.ids),
        "added": report.added,
        "unchanged": report.skipped,
        "passed_over": [str(file) for file in others],
        "cache_bytes": stats.num_bytes,
        "evicted": stats.evictions,
        "model": engine.model.name,
        "codec": engine.codec,
    }
    if as_json:
        print_json(result)
    else:
        stdout().print(
            f"{count(len(texts), 'document')}, {count(len(report.ids), 'chunk')}: {report.added} added, "
            f"{report.skipped} unchanged; {size(stats.num_bytes)} of caches in {place.path}"
        )
    if lacking:
        tell("warning", f"{len(lacking)} chunks have no cache to pin; the budget may be too small")


def warm(
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    only_missing: Annotated[
        bool,
        typer.Option("--only-missing", help="Believe caches that are there; write no labels into Chroma."),
    ] = False,
    order: Annotated[
        Literal["stored", "short", "long"],
        typer.Option(
            help="Which first: as they lie (stored), many chunks soon (short), or what saves most (long)."
        ),
    ] = "stored",
    codec: CodecOption = None,
    ttl: TtlOption = None,
    budget: BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the caches that chunks lack, also of a Chroma collection that somebody else has filled.

    Can be interrupted and run again: what is built stays. Stops when the budget is full. Without
    --only-missing every cache that is there is proven first, and built anew if it is damaged.

    Example: kvrag warm --chroma http://localhost:8000 --only-missing
    """
    place = open_home(folder, chroma, collection, tenant)
    if not place.has_collection():
        raise InputError(
            f"there is no collection {collection!r} here; run kvrag ingest PATH, or name another with "
            "--collection"
        )
    remember(place, ttl=ttl, budget=budget)
    with load_engine(place, model, device, dtype, codec=codec) as engine:
        warn_of_reader(engine, place)
        place.remember(engine, place.form(engine))
        most = place.settings().budget_bytes
        with place.corpus(engine) as corpus, token_bar("warming") as progress:
            report = corpus.warm(
                only_missing=only_missing,
                order=_ORDERS[order],
                room=None if most is None else lambda: most - engine.store.stats().num_bytes,
                progress=progress,
            )
    if as_json:
        print_json(asdict(report))
        return
    stdout().print(
        f"{count(report.records, 'chunk')}: {count(report.built, 'cache')} built ({size(report.num_bytes)}), "
        f"{report.known} were there"
    )
    for name in report.unencodable:
        tell("warning", f"{name} cannot be read by this model (empty or too long)")
    if report.is_full:
        tell("note", "the budget is full, and the rest stays without caches; see kvrag budget --help")


_ORDERS: dict[str, Callable[[str, int], int] | None] = {
    "stored": None,
    "short": lambda _, num_tokens: num_tokens,
    "long": lambda _, num_tokens: -num_tokens,
}
