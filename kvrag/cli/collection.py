"""kvrag ls, rm, stats, reconcile: what is in the collection, and taking it out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvrag.cli.opening import load_engine, open_home
from kvrag.errors import InputError
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
)
from kvrag.terminal import print_json, print_rows, progress_bar, size, stderr, stdout


def list_documents(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    as_json: JsonOption = False,
) -> None:
    """List the chunks of the collection.

    Example: kvrag ls --json
    """
    place = open_home(folder, chroma, collection)
    place.settings()
    with place.corpus() as corpus:
        records = sorted(corpus.documents(), key=lambda r: (str(r.metadata.get("source", "")), r.id))
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [(r.id, str(r.metadata.get("source", "")), " ".join(r.text.split())) for r in records]
    print_rows(("id", "source", "text"), rows)
    stdout().print(f"{len(records)} chunks")


def rm(
    names: Annotated[list[str], typer.Argument(help="Ids of chunks, sources, or files.", show_default=False)],
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    as_json: JsonOption = False,
) -> None:
    """Remove chunks by id, or all chunks of a source or file; their caches' bytes go with them.

    Example: kvrag rm notes/old.md
    """
    from kvrag.home import file_of  # noqa: PLC0415

    place = open_home(folder, chroma, collection)
    place.settings()
    with place.corpus() as corpus:
        sources = {r.id: str(r.metadata.get("source", "")) for r in corpus.documents()}
        called = {i: {i, source, file_of(source)} for i, source in sources.items()}
        if unknown := sorted(set(names) - set().union(*called.values())):
            raise InputError(f"nothing is called {', '.join(unknown)}; kvrag ls shows ids and sources")
        ids = [i for i, names_of_it in called.items() if names_of_it & set(names)]
        corpus.delete(ids)
    place.sweep()
    if as_json:
        print_json({"removed": ids})
    else:
        stdout().print(f"removed {len(ids)} chunks and their caches")


def stats(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    as_json: JsonOption = False,
) -> None:
    """Count chunks, entries and bytes.

    Example: kvrag stats
    """
    place = open_home(folder, chroma, collection)
    settings = place.settings()
    with place.corpus() as corpus:
        counts = corpus.stats()
    result = {
        "home": str(place.path),
        "model": settings.model,
        "chunks": counts.documents,
        "entries": counts.store.entries,
        "cache_bytes": counts.store.num_bytes,
    }
    if as_json:
        print_json(result)
        return
    out = stdout()
    out.print(f"{counts.documents} chunks, {counts.store.entries} caches, {size(counts.store.num_bytes)}")
    out.print(f"model {settings.model}, folder {place.path}")


def reconcile(
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make the caches what the collection says, after a crash or a change made elsewhere.

    Example: kvrag reconcile
    """
    place = open_home(folder, chroma, collection)
    place.settings()
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
    stdout().print(f"{report.records} chunks: {words}")
    for name in report.unencodable:
        stderr().print(f"warning: {name} cannot be read by this model (empty or too long)")
