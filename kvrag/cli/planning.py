"""kvrag size: what ingesting would take, before it is done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrag.cli.opening import load_texts, open_home
from kvrag.options import (
    ByParagraphOption,
    ChunkTokensOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
    PathsArgument,
)
from kvrag.terminal import duration, print_json, print_table, size, stderr, stdout


def size_up(
    paths: PathsArgument,
    model: ModelOption = None,
    folder: HomeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    chunk_tokens: ChunkTokensOption = 512,
    by_paragraph: ByParagraphOption = False,
    codec: Annotated[
        str, typer.Option(help="Reckon documents in raw, fp8, int8 or int4.", metavar="CODEC")
    ] = "raw",
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and read a little, instead of estimating.")
    ] = False,
    top: Annotated[int, typer.Option(help="How many documents to show.", min=0, metavar="NUMBER")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Say how many bytes and minutes caches of these documents would take, and which are worth it.

    Nothing is ingested. Without --measure only the model's configuration and tokenizer are read, and times
    are estimated from its number of parameters.

    Example: kvrag size notes/ report.pdf --model Qwen/Qwen2.5-7B-Instruct
    """
    from kvrag.model import quiet  # noqa: PLC0415 - help texts must not wait for torch
    from kvrag.sizing import estimate_size  # noqa: PLC0415

    quiet()
    place = open_home(folder, None, "kvrag")
    name = model or place.model()
    texts, _ = load_texts(paths)
    with stderr().status("reckoning"):
        report = estimate_size(
            texts,
            model=name,
            dtype=dtype,
            device=device,
            codec=codec,
            chunk_tokens=chunk_tokens,
            by_paragraph=by_paragraph,
            measure=measure,
            folder=place.path if place.path.is_dir() else Path.cwd(),
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print(report, top)


def _print(report: Any, top: int) -> None:
    out = stdout()
    how = "measured" if report.speed.is_measured else "estimated: see --measure"
    rate = report.speed.tokens_per_second
    copies = f", {report.duplicates} duplicates left out" if report.duplicates else ""
    out.print(f"{report.model}: {report.parameters / 1e6:,.1f}M parameters, {report.dtype} on this machine")
    out.print(f"{len(report.documents)} documents, {report.chunks} chunks{copies}, {report.tokens:,} tokens")
    out.print(f"{duration(report.seconds)} to read once, at {rate:,.0f} tokens/s ({how})")
    out.print("")
    print_table(
        ("codec", "all caches", "per token", "load a chunk", "saves", "pays after"),
        [
            (
                codec.codec,
                size(codec.num_bytes) if codec.num_bytes else "impossible",
                size(codec.bytes_per_token),
                duration(codec.load_seconds),
                duration(codec.saved_seconds) if codec.saved_seconds > 0 else "nothing",
                _times(codec.break_even),
            )
            for codec in report.codecs
        ],
    )
    if top:
        out.print("")
        print_table(
            ("document", "chunks", "tokens", report.codec, "saves", "pays after"),
            [
                (
                    document.source,
                    str(document.chunks),
                    f"{document.tokens:,}",
                    size(document.num_bytes),
                    duration(document.saved_seconds) if document.saved_seconds > 0 else "nothing",
                    _times(document.break_even) if document.chunks else "duplicate",
                )
                for document in report.documents[:top]
            ],
        )
        if len(report.documents) > top:
            out.print(f"and {len(report.documents) - top} more; --top shows more, --json all of them")
    out.print("\nsaves: until the first token, per chunk of a question; pays after: questions")


def _times(count: int | None) -> str:
    return "never" if count is None else str(count)
