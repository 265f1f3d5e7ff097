"""kvrag ingest: documents are read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvrag.cli.opening import load_engine, open_home, warn_of_reader
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
)
from kvrag.terminal import print_json, progress_bar, size, stdout


def ingest(
    paths: Annotated[
        list[Path], typer.Argument(help="Files or folders: .txt .md .pdf .jsonl", show_default=False)
    ],
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    chunk_tokens: Annotated[int, typer.Option(help="Longest chunk, in tokens.", min=1)] = 512,
    by_paragraph: Annotated[
        bool, typer.Option("--by-paragraph", help="Make each paragraph a chunk.")
    ] = False,
    neighbours: Annotated[
        int | None,
        typer.Option(
            help="Encode each chunk behind so many similar ones; 0: none.", min=0, show_default=False
        ),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="How caches are written: raw, fp8, int8 or int4 [as before; raw].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read documents once: into the collection, and as KV caches into the store.

    Run again after a change, or after an interruption: chunks that are there are kept, and those that a file
    no longer has are removed. (Of files that are gone altogether, kvrag rm removes them.)

    Example: kvrag ingest notes/ report.pdf --model Qwen/Qwen2.5-7B-Instruct
    """
    from kvrag import documents as files  # noqa: PLC0415
    from kvrag import home as homes  # noqa: PLC0415

    place = open_home(folder, chroma, collection)
    texts = list(files.load(paths))
    with load_engine(place, model, device, dtype, codec=codec) as engine:
        warn_of_reader(engine, place)
        with progress_bar("reading") as progress:
            report = homes.ingest(
                place,
                engine,
                texts,
                chunk_tokens=chunk_tokens,
                by_paragraph=by_paragraph,
                neighbours=neighbours,
                progress=progress,
            )
        stats = engine.store.stats()
    result = {
        "documents": len(texts),
        "chunks": len(report.ids),
        "added": report.added,
        "unchanged": report.skipped,
        "cache_bytes": stats.num_bytes,
        "model": engine.model.name,
    }
    if as_json:
        print_json(result)
    else:
        stdout().print(
            f"{len(texts)} documents, {len(report.ids)} chunks: {report.added} added, "
            f"{report.skipped} unchanged; {size(stats.num_bytes)} of caches in {place.path}"
        )
