"""The command line: kvrag ingest | ask | ls | rm | stats | reconcile | doctor | demo."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from kvrag.config import Context, Sampling, home
from kvrag.errors import InputError, KVRagError
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    ModelOption,
    check_layers,
    parse_keep,
    parse_layers,
)
from kvrag.terminal import print_json, print_reply, print_rows, progress_bar, size, stderr, stdout

# Typer brings a Click of its own or uses the one there is, depending on the version.
_ClickError: Any = typer.BadParameter.__mro__[2]

# Written out, since help must not wait for torch; a test compares them with what there is.
_POLICIES = "plain, cachefocus, naive, pcw, ape, epic, cacheblend, query-driven"

app = typer.Typer(
    help="Answers over your documents from prebuilt KV caches: each document is read once, at ingestion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _open(folder: Path | None, chroma: str | None, collection: str) -> Any:
    from kvrag.home import Home  # noqa: PLC0415 - help texts must not wait for torch and chromadb

    return Home(folder or home(), chroma=chroma, collection=collection)


def _engine(
    place: Any, model: str | None, device: str | None, dtype: str, *, codec: str | None = None
) -> Any:
    from kvrag.engine import Engine  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    name = model or place.model()
    with stderr().status(f"loading {name}"):
        return Engine.from_pretrained(
            name, store=place.store(), device=device, dtype=dtype, codec=codec or place.codec()
        )


def _warn_of_reader(engine: Any, place: Any) -> None:
    """Say what the shipped model is, the first time that a folder's documents are read by it."""
    from kvrag.model import READER  # noqa: PLC0415

    if engine.model.name == READER and not (place.exists() and READER in place.settings().forms):
        stderr().print(
            "note: kvrag/reader is a tiny model that only knows the made-up world of `kvrag demo`; "
            "name a real one for documents of your own, e.g. --model Qwen/Qwen2.5-7B-Instruct"
        )


@app.command(short_help="Read documents once, and keep their caches.")
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
    context: Annotated[
        str | None,
        typer.Option(
            help="Encode each chunk behind: before (the parts before it), similar:2, or alone. "
            "before/1024: at most so many tokens [as it was; before].",
            show_default=False,
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

    chosen = None if context is None else Context.parse(context)
    place = _open(folder, chroma, collection)
    texts = list(files.load(paths))
    with _engine(place, model, device, dtype, codec=codec) as engine:
        _warn_of_reader(engine, place)
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


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    k: Annotated[int, typer.Option("-k", help="Chunks to retrieve.", min=1)] = 4,
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    policy: Annotated[str, typer.Option(help=f"What is done with the documents: {_POLICIES}.")] = "plain",
    keep: Annotated[
        str | None,
        typer.Option(help="Prune until so many documents are left: 4, or 0.5 for half.", metavar="NUMBER"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Prune by these layers' attention; kvrag doctor names them.", metavar="1,2,..."),
    ] = None,
    rows: Annotated[
        Literal["question", "last"], typer.Option(help="Prune by the attention of these rows.")
    ] = "question",
    repair: Annotated[
        float | None, typer.Option(help="Share of the documents to read again.", metavar="SHARE")
    ] = None,
    max_risk: Annotated[
        float | None,
        typer.Option(help="Read the documents in full if the risk is above, 0 to 1.", metavar="RISK"),
    ] = None,
    spans: Annotated[bool, typer.Option("--spans", help="Show the strongest place in documents.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show which parts of the prompt were read.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the ingested documents.

    Example: kvrag ask "Where does Jane Doe live?" -k 6 --policy cachefocus
    """
    from kvrag.explain import explain  # noqa: PLC0415
    from kvrag.rag import ask as stream  # noqa: PLC0415
    from kvrag.rag import policy_of  # noqa: PLC0415

    if not question.strip():
        raise InputError("the question is empty")
    pruned_by = parse_layers(layers)
    chosen = policy_of(
        policy,
        keep=parse_keep(keep),
        layers=pruned_by,
        rows=rows,
        repair=repair,
        max_risk=max_risk,
        spans=spans,
    )
    place = _open(folder, chroma, collection)
    place.settings()
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    out = stdout()
    with _engine(place, model, device, dtype) as engine, place.corpus(engine) as corpus:
        check_layers(pruned_by, engine.model.num_layers)
        form = place.form(engine)
        asked = stream(engine, corpus, question, k=k, form=form, sampling=sampling, policy=chosen)
        for piece in asked:
            if not as_json:
                out.print(piece, end="")
        reply = asked.reply()
    if as_json:
        print_json(reply.as_dict())
        return
    out.print("\n")
    print_reply(reply)
    if plan:
        out.print(explain(reply.answer.plan))


@app.command("ls")
def list_documents(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    as_json: JsonOption = False,
) -> None:
    """List the chunks of the collection.

    Example: kvrag ls --json
    """
    place = _open(folder, chroma, collection)
    place.settings()
    with place.corpus() as corpus:
        records = sorted(corpus.documents(), key=lambda r: (str(r.metadata.get("source", "")), r.id))
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [(r.id, str(r.metadata.get("source", "")), " ".join(r.text.split())) for r in records]
    print_rows(("id", "source", "text"), rows)
    stdout().print(f"{len(records)} chunks")


@app.command(short_help="Remove chunks or files, and their caches.")
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

    place = _open(folder, chroma, collection)
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


@app.command()
def stats(
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    as_json: JsonOption = False,
) -> None:
    """Count chunks, entries and bytes.

    Example: kvrag stats
    """
    place = _open(folder, chroma, collection)
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


@app.command(short_help="Mend the caches after a crash.")
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
    place = _open(folder, chroma, collection)
    place.settings()
    with (
        _engine(place, model, device, dtype) as engine,
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


@app.command(short_help="Prove that a model is read exactly; measure quality.")
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a model.")] = "kvrag/reader",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    questions: Annotated[int, typer.Option(help="Questions to compare policies on.", min=1)] = 8,
    max_kl: Annotated[float, typer.Option(help="What a codec may lose, in nats.", min=0.0)] = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Prove that a model's caches can be re-positioned, measure what each policy loses, and recommend one.

    The proof is exact; the measurements are small: sample documents against full attention. For a model of
    billions of weights on a CPU, ask fewer questions.

    Example: kvrag doctor Qwen/Qwen2.5-0.5B-Instruct
    """
    from kvrag import doctor as clinic  # noqa: PLC0415
    from kvrag.engine import Engine  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    with stderr().status(f"loading {model}"):
        engine = Engine.from_pretrained(model, device=device, dtype=dtype)
    with engine, progress_bar("examining") as progress:
        report = clinic.examine(engine, questions=questions, max_kl=max_kl, progress=progress)
    if as_json:
        print_json(asdict(report))
    else:
        stdout().print(clinic.describe(report))
    if not report.is_exact:
        raise typer.Exit(1)


@app.command(short_help="Answer questions about a made-up collection.")
def demo(
    model: ModelOption = None,
    documents: Annotated[int, typer.Option(help="Documents in the collection.", min=1)] = 40,
    questions: Annotated[int, typer.Option(help="Questions to ask.", min=1)] = 20,
    k: Annotated[int, typer.Option("-k", help="Chunks to retrieve for each question.", min=1)] = 8,
    by_paragraph: Annotated[
        bool, typer.Option("--by-paragraph", help="Cut documents; their second part names nobody.")
    ] = False,
    folder: Annotated[Path | None, typer.Option("--home", help="Keep collection and caches here.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ingest a made-up collection, ask about it, and compare with ordinary full prefill.

    Example: kvrag demo --model Qwen/Qwen2.5-7B-Instruct
    """
    from kvrag import demo as show  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    show.run(
        model=model,
        num_documents=documents,
        num_questions=questions,
        k=k,
        by_paragraph=by_paragraph,
        folder=folder,
        device=device,
        dtype=dtype,
        as_json=as_json,
    )


def main() -> None:
    """Run the command line; exit status 2 and one line for bad input, 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    _quiet_libraries()
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="kvrag", standalone_mode=False)
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "kvrag"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except KVRagError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    if status == 130:
        stderr().print("interrupted: what is complete stays; run the same command again to go on")
    sys.exit(status or 0)


def _fail(message: str) -> NoReturn:
    """One line, and out."""
    sys.stderr.write(f"error: {message.strip().splitlines()[0]}\n")
    sys.exit(2)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below are not ours to show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
