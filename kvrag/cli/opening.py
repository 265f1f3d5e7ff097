"""Opens what commands work on: the folder, and the model. Help texts must not wait for torch and chromadb."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvrag.config import home
from kvrag.errors import InputError
from kvrag.options import parse_budget, parse_seconds, tenant_named
from kvrag.terminal import count, loading, stderr, tell

_READ = "kvrag reads .txt .md .pdf .jsonl"


def open_home(folder: Path | None, chroma: str | None, collection: str, tenant: str | None = None) -> Any:
    """The `Home` of a command's options."""
    from kvrag.home import Home  # noqa: PLC0415 - help texts must not wait for torch and chromadb

    return Home(folder or home(), chroma=chroma, collection=collection, tenant=tenant_named(tenant))


def secret(file: Path | None) -> bytes | None:
    """The secret in a file; None for no file.

    Raises:
        InputError: there is no such file, or no secret in it.
    """
    from kvrag.errors import ConfigError  # noqa: PLC0415
    from kvrag.keys import read_key  # noqa: PLC0415

    if file is None:
        return None
    if not file.is_file():  # digits on a command line are there for all to see
        raise InputError(f"{file}: no such file; kvrag keygen --secret FILE makes a key")
    try:
        return read_key(file)
    except ConfigError as error:
        raise InputError(f"{file}: {error}") from error


@contextmanager
def store_folder(place: Path) -> Iterator[Any]:
    """The folder's store, to measure its disk by; an empty one beside where it would lie if there is none."""
    from kvrag.store.disk import DiskStore  # noqa: PLC0415

    if (place / "store").is_dir():
        yield DiskStore(place / "store")  # no entry is read, so no key is needed
        return
    near = next((p for p in place.absolute().parents if p.is_dir() and os.access(p, os.W_OK)), None)
    with TemporaryDirectory(prefix=".kvrag-doctor-", dir=near, ignore_cleanup_errors=True) as made:
        yield DiskStore(made)


def load_engine(
    place: Any,
    model: str | None,
    device: str | None,
    dtype: str,
    *,
    codec: str | None = None,
    max_kl: float | None = None,
) -> Any:
    """An engine with the folder's store; the folder's model and codec unless others are given."""
    from kvrag.engine import Engine  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    name = model or place.model()
    with loading(name):
        return Engine.from_pretrained(
            name,
            store=place.store(),
            device=device,
            dtype=dtype,
            codec=codec or place.codec(),
            max_kl=max_kl,
            tenant=place.tenant,
        )


def load_texts(paths: list[Path]) -> tuple[list[Any], list[Path]]:
    """The documents of files and folders; and files in folders that are none, which a note tells.

    Raises:
        InputError: there is no text in them.
    """
    from kvrag import documents as files  # noqa: PLC0415

    texts, others = list(files.load(paths)), files.passed_over(paths)
    if others:
        types = ", ".join(sorted({file.suffix.lower() or file.name for file in others})[:5])
        were = "was" if len(others) == 1 else "were"
        tell("note", f"{count(len(others), 'file')} ({types}) {were} passed over; {_READ}")
    if not any(document.text.strip() for document in texts):
        raise InputError(f"no text found in {', '.join(map(str, paths[:3]))}; {_READ}")
    return texts, others


def remember(place: Any, *, ttl: str | None = None, budget: str | None = None) -> None:
    """Note what was chosen for all later commands, too."""
    if ttl is not None:
        place.change(ttl_seconds=parse_seconds(ttl))
    if budget is not None:
        place.change(budget_bytes=parse_budget(budget))


def fit_codec(engine: Any, place: Any, texts: list[str], chunk_tokens: int, max_kl: float) -> None:
    """Choose the engine's codec by what it loses on these documents, and say which it is."""
    from kvrag import doctor  # noqa: PLC0415
    from kvrag.documents import split  # noqa: PLC0415

    tokenize, most = engine.model.text.tokenize, max(1, min(chunk_tokens, engine.model.max_length // 8))
    chunks = [chunk for text in texts for chunk in split(text, tokenize, most)]
    with stderr().status("comparing codecs"):
        fit = doctor.fit_codec(engine, chunks, max_kl=max_kl, form=place.form(engine))
    loss = next((score.kl for score in fit.scores if score.name == fit.codec), 0.0)
    stderr().print(
        f"codec {fit.codec}: loses {loss:.2g} nats of at most {max_kl:g}, on {fit.questions} prompts"
    )


def warn_of_reader(engine: Any, place: Any) -> None:
    """Say what the shipped model is, the first time that a folder's documents are read by it."""
    from kvrag.model import READER  # noqa: PLC0415

    if engine.model.name == READER and not (place.exists() and READER in place.settings().forms):
        tell(
            "note",
            "kvrag/reader is a tiny model that only knows the made-up world of `kvrag demo`; "
            "name a real one for documents of your own, e.g. --model Qwen/Qwen2.5-7B-Instruct",
        )


def chosen_ids(corpus: Any, names: list[str]) -> list[str]:
    """Ids of the chunks that these names mean: ids, sources, or files.

    Raises:
        InputError: a name that nothing has.
    """
    from kvrag.home import file_of  # noqa: PLC0415

    sources = {r.id: str(r.metadata.get("source", "")) for r in corpus.documents()}
    called = {i: {i, source, file_of(source)} for i, source in sources.items()}
    if unknown := sorted(set(names) - set().union(*called.values())):
        raise InputError(f"nothing is called {', '.join(unknown)}; kvrag ls shows ids and sources")
    return [i for i, names_of_it in called.items() if names_of_it & set(names)]


def pin_entries(corpus: Any, store: Any, ids: list[str], *, pinned: bool = True) -> list[str]:
    """Pin the caches of these chunks, or let go of them; ids of chunks that have none."""
    entries = corpus.entries_of(ids)
    return [i for i in ids if i not in entries or not store.pin(entries[i], pinned)]
