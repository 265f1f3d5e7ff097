"""A collection as one file: there and back, whom to trust, interruptions, and everything that is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromadb.utils.embedding_functions import register_embedding_function

from kvrag.chroma_rows import Record
from kvrag.config import ALONE, Context
from kvrag.documents import Document
from kvrag.embedding import HashedEmbedding
from kvrag.engine import Engine
from kvrag.errors import CorpusLocked, InputError
from kvrag.home import Home, ingest
from kvrag.index import Index
from kvrag.model import Model
from kvrag.portable import (
    Refused,
    export_collection,
    import_collection,
    make_keys,
    private_key,
    public_key,
)
from kvrag.portable.archive import Archive, Writer, header
from kvrag.portable.staging import abandoned
from kvrag.rag import ask
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny

TEXTS = {
    "a.txt": "The lighthouse of Varn was built in 1871.",
    "b.txt": "A ferry crosses the Mirrow twice a day.",
    "c.txt": "The orchard at Lindal grows apples and plums.",
}


@cache
def model(seed: int = 0) -> Model:
    found = tiny(seed=seed)
    found.name = f"tiny {seed}"
    return found


def fill(home: Home, texts: dict[str, str] = TEXTS, **options: Any) -> None:
    options.setdefault("context", ALONE)
    with Engine(model(), home.store()) as engine:
        ingest(home, engine, [Document(text, source) for source, text in texts.items()], **options)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A folder with three documents; not to be changed."""
    home = Home(tmp_path_factory.mktemp("filled") / "home")
    fill(home)
    return home


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A private key's file, and the public one."""
    path = tmp_path_factory.mktemp("keys") / "mine"
    _, line = make_keys(path)
    return path, public_key(line)


@pytest.fixture(scope="module")
def plain(filled: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that nobody signed; not to be changed."""
    path = tmp_path_factory.mktemp("plain") / "plain.kvrag"
    export_collection(filled, path)
    return path


@pytest.fixture(scope="module")
def signed(filled: Home, keys: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signed") / "signed.kvrag"
    export_collection(filled, path, key=private_key(keys[0]))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty folder."""
    return Home(tmp_path / "there")


def content(home: Home) -> dict[str, Any]:
    """Everything that an import could change, the times of files apart."""
    if not home.path.exists():
        return {}
    with home.corpus() as corpus:
        index = corpus._index
        vectors = {r.id: (r.text, r.metadata, tuple(v)) for r, v in index.records_with_vectors()}
        references = corpus._references.of(index.id)
    files = {
        str(file.relative_to(home.path)): file.read_bytes()
        for file in [*home.path.glob("store/??/*"), home.path / "settings.json"]
        if file.exists()
    }
    return {"vectors": vectors, "references": references, "files": files}


def without_owner(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "files": {k: v for k, v in state["files"].items() if k != "settings.json"}}


# ---- there and back


def test_everything_arrives(filled: Home, plain: Path, home: Home) -> None:
    report = import_collection(home, plain, allow_unsigned=True)
    assert (report.records, report.added, report.entries, report.known, report.skipped) == (3, 3, 3, 0, 0)
    assert (report.model, report.signer) == ("tiny 0", None)
    assert list(report.made_by.values()) == [3]
    assert content(home) == content(filled)
    assert home.settings() == filled.settings()
    with Engine(model(), home.store()) as engine, home.corpus(engine) as corpus:
        assert corpus.reconcile().was_equal
        reply = ask(engine, corpus, "Where is the ferry?", k=3, form=home.form(engine)).reply()
        assert all(source.is_hit for source in reply.sources)


def test_twice_changes_nothing(plain: Path, home: Home) -> None:
    import_collection(home, plain, allow_unsigned=True)
    before = content(home)
    again = import_collection(home, plain, allow_unsigned=True)
    assert (again.added, again.entries, again.known) == (0, 0, 3)
    assert content(home) == before


def test_an_export_is_a_plain_tar_of_readable_parts(filled: Home, plain: Path, tmp_path: Path) -> None:
    with tarfile.open(plain, "r:") as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "out", filter="data")
    assert (names[0], names[1], names[-1]) == ("kvrag.json", "records/000000.jsonl", "manifest.jsonl")
    for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines():
        told = json.loads(line)
        raw = (tmp_path / "out" / told["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (told["size"], told["sha256"])
    for file in filled.path.glob("store/??/*"):
        assert (tmp_path / "out" / "entries" / file.name).read_bytes() == file.read_bytes()


def test_an_export_of_an_import_is_the_same_but_for_its_time(plain: Path, home: Home, tmp_path: Path) -> None:
    import_collection(home, plain, allow_unsigned=True)
    export_collection(home, tmp_path / "again.kvrag")

    before, after = parts_of(plain), parts_of(tmp_path / "again.kvrag")
    for parts in (before, after):
        del parts["kvrag.json"], parts["manifest.jsonl"]  # have the time
        lines = map(json.loads, parts.pop("records/000000.jsonl").splitlines())
        parts["records"] = {line["id"]: (line["text"], line["metadata"], line["entry"]) for line in lines}  # type: ignore[assignment]
    assert after == before


@pytest.mark.parametrize("context", ["alone", "similar:1", "before/64"])
def test_documents_behind_others_arrive(context: str, home: Home, tmp_path: Path) -> None:
    there = Home(tmp_path / "from")
    fill(there, context=Context.parse(context))
    export_collection(there, tmp_path / "near.kvrag")
    import_collection(home, tmp_path / "near.kvrag", allow_unsigned=True)
    assert content(home) == content(there)
    with Engine(model(), home.store()) as engine, home.corpus(engine) as corpus:
        assert str(corpus.context) == context
        assert corpus.reconcile().was_equal


def test_documents_that_share_a_cache_arrive(home: Home, tmp_path: Path) -> None:
    there = Home(tmp_path / "from")
    fill(there, {**TEXTS, "copy.txt": TEXTS["a.txt"]})
    export_collection(there, tmp_path / "shared.kvrag")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvrag.portable.staging._BATCH", 1)
        report = import_collection(home, tmp_path / "shared.kvrag", allow_unsigned=True)
    assert (report.added, report.entries) == (4, 3)
    assert content(home) == content(there)


def test_what_is_there_stays(plain: Path, home: Home) -> None:
    fill(home, {"d.txt": "The mill at Osk grinds rye.", "a.txt": TEXTS["a.txt"]})
    report = import_collection(home, plain, allow_unsigned=True)
    assert (report.added, report.replaced, report.entries, report.known) == (2, 0, 2, 1)
    with home.corpus() as corpus:
        assert {record.text for record in corpus.documents()} == {
            *TEXTS.values(),
            "The mill at Osk grinds rye.",
        }


def test_missing_caches_are_completed(plain: Path, home: Home) -> None:
    import_collection(home, plain, allow_unsigned=True)
    store = home.store()
    store.delete(next(store.ids()))
    assert import_collection(home, plain, allow_unsigned=True).entries == 1
    assert store.check().ok


def test_another_text_under_the_same_id_has_to_be_asked_for(plain: Path, home: Home) -> None:
    import_collection(home, plain, allow_unsigned=True)
    with Engine(model(), home.store()) as engine, home.corpus(engine) as corpus:
        (first, *_) = sorted(record.id for record in corpus.documents())
        corpus.update([first], texts=["Something else."])
    before = content(home)
    with pytest.raises(InputError, match=r"1 documents are here with another text.*--replace.*nothing was"):
        import_collection(home, plain, allow_unsigned=True)
    assert content(home) == before
    report = import_collection(home, plain, allow_unsigned=True, replace=True)
    assert (report.added, report.replaced) == (0, 1)
    assert len(list(home.store().ids())) == 3  # the other text's cache is gone
    with home.corpus() as corpus:
        assert {record.text for record in corpus.documents()} == set(TEXTS.values())


def test_documents_without_caches_are_exported(home: Home, tmp_path: Path) -> None:
    there = Home(tmp_path / "from")
    fill(there)
    store = there.store()
    damaged, gone, _ = sorted(store.ids())
    store.delete(gone)
    store.files_of(damaged)[1].write_bytes(b"\0" * 100)
    report = export_collection(there, tmp_path / "some.kvrag")
    assert (report.records, report.entries) == (3, 1)
    assert import_collection(home, tmp_path / "some.kvrag", allow_unsigned=True).entries == 1
    with home.corpus() as corpus:
        assert corpus.stats().documents == 3


def test_many_documents_come_in_parts(filled: Home, home: Home, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("kvrag.portable.outgoing._PART_BYTES", 100)
    export_collection(filled, tmp_path / "parts.kvrag")
    with tarfile.open(tmp_path / "parts.kvrag", "r:") as tar:
        assert sum(name.startswith("records/") for name in tar.getnames()) == 3
    import_collection(home, tmp_path / "parts.kvrag", allow_unsigned=True)
    assert content(home) == content(filled)


def test_an_empty_collection(home: Home, tmp_path: Path) -> None:
    there = Home(tmp_path / "from")
    fill(there)
    with there.corpus() as corpus:
        corpus.delete([record.id for record in corpus.documents()])
    export_collection(there, tmp_path / "empty.kvrag")
    assert import_collection(home, tmp_path / "empty.kvrag", allow_unsigned=True).records == 0
    assert home.exists()


def test_progress_is_told(filled: Home, plain: Path, home: Home, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export_collection(filled, tmp_path / "x.kvrag", progress=lambda *done: told.append(done))
    assert told[-1] == (3, 3)
    import_collection(home, plain, allow_unsigned=True, progress=lambda *done: told.append(done))
    assert told[-1][1] == plain.stat().st_size


# ---- files of other models


def test_caches_of_another_model_are_counted(plain: Path, home: Home) -> None:
    ours, other = (model(seed).fingerprint() for seed in (0, 1))
    assert import_collection(home, plain, allow_unsigned=True, usable_by=ours).unusable == 0
    report = import_collection(home, plain, allow_unsigned=True, usable_by=other)
    assert (report.unusable, report.skipped) == (3, 0)


def test_caches_of_another_model_can_be_left_out(plain: Path, home: Home) -> None:
    other = model(1).fingerprint()
    report = import_collection(home, plain, allow_unsigned=True, usable_by=other, usable_only=True)
    assert (report.added, report.entries, report.unusable, report.skipped) == (3, 0, 0, 3)
    assert list(home.store().ids()) == []


# ---- signatures


def test_a_trusted_signature_is_enough(signed: Path, keys: tuple[Path, bytes], home: Home) -> None:
    report = import_collection(home, signed, trust=[keys[1]])
    assert report.added == 3
    assert public_key(str(report.signer)) == keys[1]


def test_an_unknown_signature_is_refused(signed: Path, home: Home, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"signed by kvrag-ed25519:\S+, which is not trusted here.*--trust"):
        import_collection(home, signed)
    _, line = make_keys(tmp_path / "other")
    with pytest.raises(Refused, match="not trusted here"):
        import_collection(home, signed, trust=[public_key(line)], allow_unsigned=True)
    assert not home.path.exists()


def test_an_unsigned_file_is_refused(plain: Path, keys: tuple[Path, bytes], home: Home) -> None:
    for trust in ([], [keys[1]]):
        with pytest.raises(Refused, match=r"it is not signed; .*--allow-unsigned"):
            import_collection(home, plain, trust=trust)
    assert not home.path.exists()


def test_keys_are_files_that_are_never_overwritten(tmp_path: Path) -> None:
    public, line = make_keys(tmp_path / "mine")
    assert public_key(line) == public_key(str(public)) == public_key(f" {line}\n")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    for name in ("mine", "mine.pub"):
        kept = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="exists; keys are never overwritten"):
            make_keys(tmp_path / "mine")
        assert (tmp_path / name).read_bytes() == kept
    with pytest.raises(InputError, match="cannot be written"):
        make_keys(tmp_path / "nowhere" / "mine")


@pytest.mark.parametrize(
    "text", ["", "x", "kvrag-ed25519:", "kvrag-ed25519:AAAA", "kvrag-ed25519:§", "nowhere"]
)
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(InputError, match="public key"):
        public_key(text)


def test_what_is_no_private_key(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="no private key; expected a file that kvrag keygen made"):
        private_key(tmp_path / "text")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        private_key(tmp_path / "nowhere")
    public, _ = make_keys(tmp_path / "mine")
    with pytest.raises(InputError, match="no private key"):
        private_key(public)


# ---- attacks: a tool that writes any archive, signed or not


Parts = dict[str, bytes]


def parts_of(path: Path) -> Parts:
    with tarfile.open(path, "r:") as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def write(path: Path, parts: Parts, key: Path | None = None) -> Path:
    """An archive of these members whose digests are right, whatever they say."""
    with path.open("wb") as file:
        writer = Writer(file)
        for name, raw in parts.items():
            if name not in ("manifest.jsonl", "signature.json"):
                writer.add(name, raw)
        made = private_key(key) if key else None
        sign = None if made is None else lambda d: (made.public_key().public_bytes_raw(), _sign(made, d))
        writer.finish(sign)
        writer.close()
    return path


def _sign(key: Any, digest: bytes) -> bytes:
    return bytes(key.sign(b"kvrag portable collection, version 1\0" + digest))


@pytest.fixture
def assert_refused(home: Home, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Import a file into an empty and into a filled folder: one clear line, and nothing is changed."""
    full = Home(tmp_path / "full")
    fill(full, {"d.txt": "The mill at Osk grinds rye."})
    before = content(full)

    def check(path: Path, reason: str) -> None:
        for there in (home, full):
            with pytest.raises(InputError, match=reason) as caught:
                import_collection(there, path, allow_unsigned=True)
            assert "\n" not in str(caught.value)
            assert "nothing was changed" in str(caught.value)
        assert not home.path.exists()
        assert content(full) == before
        assert not list(full.path.glob("import-*"))

    yield check
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("full", "there", "bad")) == []


def test_the_tool_writes_what_is_accepted(plain: Path, home: Home, tmp_path: Path) -> None:
    """Otherwise everything below would be refused for the wrong reason."""
    assert write(tmp_path / "bad", parts_of(plain)).read_bytes() == plain.read_bytes()
    assert import_collection(home, tmp_path / "bad", allow_unsigned=True).added == 3


def test_every_cut_is_refused(plain: Path, tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    raw = plain.read_bytes()
    ends = sorted({0, 1, 511, 512, 700, len(raw) // 3, len(raw) // 2, len(raw) - 1025, len(raw) - 1})
    for end in ends:
        (tmp_path / "bad").write_bytes(raw[:end])
        assert_refused(tmp_path / "bad", "is no kvrag export|is cut off|is refused")


def test_what_follows_the_end_is_refused(
    plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    for more in (b"\0", b"x", bytes(512), b"#!/bin/sh\n" * 100):
        (tmp_path / "bad").write_bytes(plain.read_bytes() + more)
        assert_refused(tmp_path / "bad", "does not end where its members do")


def test_no_changed_byte_gets_through(
    signed: Path, plain: Path, keys: tuple[Path, bytes], home: Home, tmp_path: Path
) -> None:
    """A byte in every region of a signed file, one after the other; the head and all headers byte by byte."""
    raw = signed.read_bytes()
    places = {*range(512), *range(0, len(raw), max(1, len(raw) // 400))}
    archive = Archive(signed)
    for member, pieces in archive.members():
        list(pieces)
        places |= {member.start - 512, member.start - 360, member.start, member.start + member.size - 1}
    archive.close()
    bad = tmp_path / "bad"
    for at in sorted(places):
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(InputError):
            import_collection(home, bad, trust=[keys[1]], allow_unsigned=True)
    assert not home.path.exists()


def test_no_signature_of_another_file_gets_through(
    signed: Path, keys: tuple[Path, bytes], home: Home, tmp_path: Path
) -> None:
    parts = parts_of(signed)
    signature = parts["signature.json"]
    record = json.loads(parts["records/000000.jsonl"].splitlines()[0])
    parts["records/000000.jsonl"] = json.dumps({**record, "text": "Pay Mallory."}).encode() + b"\n"
    raw = write(tmp_path / "bad", parts).read_bytes()
    with (tmp_path / "bad").open("wb") as file:  # changed, its list made anew, the old signature behind it
        file.write(raw[:-1024] + header("signature.json", len(signature)) + signature)
        file.write(bytes(-len(signature) % 512) + bytes(1024))
    with pytest.raises(Refused, match="its signature is wrong"):
        import_collection(home, tmp_path / "bad", trust=[keys[1]], allow_unsigned=True)
    assert not home.path.exists()


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 400,
        b'{"algorithm": "none", "public_key": "", "signature": ""}',
        b'{"algorithm": "ed25519", "public_key": 7, "signature": 7}',
        b"x" * 5000,
    ],
)
def test_strange_signatures_are_refused(
    signature: bytes, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    raw = plain.read_bytes()[:-1024] + header("signature.json", len(signature)) + signature
    (tmp_path / "bad").write_bytes(raw + bytes(-len(signature) % 512) + bytes(1024))
    assert_refused(tmp_path / "bad", "is refused: ")


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "entries/../../evil.json",
        "entries/" + "a" * 63 + ".json",
        "entries/" + "A" * 64 + ".json",
        "entries/" + "a" * 64 + ".json\n",
        "entries/" + "a" * 64 + ".pin",
        "records/0000000.jsonl",
        "records/١٢٣٤٥٦.jsonl",
        "settings.json",
        "C:\\evil",
        "",
        "x" * 300,
    ],
)
def test_only_fixed_names(
    name: str, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    parts = parts_of(plain)
    items = [*list(parts.items())[:-1], (name, b"evil")]
    assert_refused(write(tmp_path / "bad", dict(items)), "is refused|is cut off or damaged")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_no_links_folders_and_devices(
    kind: bytes, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    info = tarfile.TarInfo("entries/" + "f" * 64 + ".json")
    info.type, info.linkname = kind, "/etc/passwd"
    raw = plain.read_bytes()
    (tmp_path / "bad").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + raw)
    assert_refused(tmp_path / "bad", "is not a plain member|is no kvrag export")


def test_no_extended_headers(plain: Path, tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    """A pax header can say any name and size; a library that honours it reads all of it into memory."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("kvrag.json")
        info.pax_headers = {"path": "../evil", "size": "99999999999"}
        tar.addfile(info)
    (tmp_path / "bad").write_bytes(raw.getvalue() + plain.read_bytes())
    assert_refused(tmp_path / "bad", "is not a plain member")


@pytest.mark.parametrize("size", [1 << 20, 1 << 33, 1 << 62, -1, (1 << 63) - 1])
def test_sizes_beyond_the_file(
    size: int, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    info = tarfile.TarInfo("kvrag.json")
    info.size, info.mode = size, 0o600
    (tmp_path / "bad").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + plain.read_bytes()[512:])
    assert_refused(tmp_path / "bad", "more than the file has|is not a plain member|is cut off|is no kvrag")


def test_duplicates_and_disorder(plain: Path, tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    parts = list(parts_of(plain).items())[:-1]
    orders = [
        parts[:1] * 2 + parts[1:],  # the head twice
        parts[:2] + parts[1:],  # the documents twice
        parts + parts[-2:],  # a cache twice
        [*parts[:-2], parts[-1], parts[-2]],  # a cache's files swapped
        parts[:-1],  # half a cache
        [*parts[:2], *parts[3:]],  # the other half
        [*parts[:2], *parts[4:6], *parts[2:4], *parts[6:]],  # not sorted
        parts[1:],  # no head
        [],
    ]
    for order in orders:
        with (tmp_path / "bad").open("wb") as file:
            writer = Writer(file)
            for name, raw in order:
                writer.add(name, raw)
            writer.finish(None)
            writer.close()
        assert_refused(tmp_path / "bad", "is refused")


def changed_head(parts: Parts, **changes: Any) -> Parts:
    head = json.loads(parts["kvrag.json"])
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            head[group][field] = value
        else:
            head[group] = value
    return {**parts, "kvrag.json": json.dumps(head).encode()}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 3}, "version 3; this kvrag reads"),
        ({"version": 2}, "its head says that it is sealed, and its list of members is not"),
        ({"format": "zip"}, "it says it is 'zip'"),
        ({"settings": None}, "its head lacks or misspells"),
        ({"settings__model": 7}, "its head lacks or misspells"),
        ({"settings__model": "x" * 5000}, "its head lacks or misspells"),
        ({"settings__codec": "../zip"}, "its head lacks or misspells"),
        ({"settings__forms": {"m": {"prefix": 7}}}, "its head lacks or misspells"),
        ({"settings__forms": {"m": {"nonsense": ""}}}, "its head lacks or misspells"),
        ({"settings__forms": []}, "its head lacks or misspells"),
        ({"collection__context": "after"}, "its head lacks or misspells"),
        ({"collection__context": 7}, "its head lacks or misspells"),
        ({"collection__embedding": "x"}, "its head lacks or misspells"),
    ],
)
def test_strange_heads(
    changes: dict[str, Any], reason: str, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    assert_refused(write(tmp_path / "bad", changed_head(parts_of(plain), **changes)), reason)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"{", b'{"a":' * 100_000, b"1" * 10_000])
def test_heads_that_are_no_object(
    raw: bytes, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    assert_refused(write(tmp_path / "bad", {**parts_of(plain), "kvrag.json": raw}), "is refused")


def test_an_embedding_is_not_chosen_by_a_file(plain: Path, home: Home, tmp_path: Path) -> None:
    """Its name would be code of ours to run, its settings an address to send texts to."""
    evil = {"name": "openai", "config": {"api_base": "http://evil.example.com"}}
    bad = write(tmp_path / "bad", changed_head(parts_of(plain), collection__embedding=evil))
    with pytest.raises(
        InputError, match="was made with the embedding 'openai'; create one with it here first"
    ):
        import_collection(home, bad, allow_unsigned=True)
    assert not home.has_collection()


@pytest.mark.parametrize("size", [-1, 1, 1 << 40, "many", None])
def test_impossible_embeddings(size: Any, plain: Path, home: Home, tmp_path: Path) -> None:
    strange = {"name": "kvrag_hashed", "config": {"size": size}}
    bad = write(tmp_path / "bad", changed_head(parts_of(plain), collection__embedding=strange))
    with pytest.raises(InputError, match=r"impossible settings.*nothing was changed"):
        import_collection(home, bad, allow_unsigned=True)
    assert not home.has_collection()


def changed_record(parts: Parts, **changes: Any) -> Parts:
    lines = parts["records/000000.jsonl"].splitlines()
    first = {k: v for k, v in {**json.loads(lines[0]), **changes}.items() if v != "ABSENT"}
    lines[0] = json.dumps(first).encode()
    return {**parts, "records/000000.jsonl": b"\n".join(lines) + b"\n"}


NAN = base64.b64encode(np.full(1024, np.nan, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": ""}, "a document lacks or misspells"),
        ({"id": 7}, "a document lacks or misspells"),
        ({"id": "\ud800"}, "a document lacks or misspells"),
        ({"text": None}, "a document lacks or misspells"),
        ({"text": "ABSENT"}, "a document lacks or misspells"),
        ({"metadata": []}, "is refused"),
        ({"metadata": "x"}, "a document lacks or misspells"),
        ({"metadata": {"x": {"y": 1}}}, "a document lacks or misspells"),
        ({"metadata": {"chroma:document": "x"}}, "is refused"),
        ({"embedding": "§"}, "a document lacks or misspells"),
        ({"embedding": "AAA="}, "a document lacks or misspells"),
        ({"embedding": ""}, "a document lacks or misspells"),
        ({"embedding": NAN}, "a document lacks or misspells"),
        ({"embedding": "AACAPw=="}, "its vectors have several lengths"),
        ({"entry": "../../evil"}, "a document lacks or misspells"),
        ({"entry": 7}, "a document lacks or misspells"),
    ],
)
def test_strange_documents(
    changes: dict[str, Any], reason: str, plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    assert_refused(write(tmp_path / "bad", changed_record(parts_of(plain), **changes)), reason)


def test_documents_that_come_twice(plain: Path, tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    parts = parts_of(plain)
    lines = parts["records/000000.jsonl"]
    assert_refused(write(tmp_path / "bad", {**parts, "records/000000.jsonl": lines * 2}), "comes twice")


def test_caches_that_are_not_what_they_say(
    plain: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    """Every digest and the signature can be right, and a cache still be no cache of its name."""
    parts = parts_of(plain)
    names = [name for name in parts if name.startswith("entries/")]
    rows = parts[names[1]]
    strange: list[Parts] = [
        {names[1]: rows[:-1] + bytes([rows[-1] ^ 1])},  # other tokens
        {names[1]: rows[:5000] + bytes([rows[5000] ^ 1]) + rows[5001:]},  # other rows
        {names[1]: rows + b"x"},
        {names[1]: rows[:-4]},
        {names[1]: b""},
        {names[0]: b"{}"},
        {names[0]: b"[]"},
        {names[0]: b""},
        {names[0]: parts[names[2]]},  # manifest of another
        {names[0]: parts[names[2]], names[1]: parts[names[3]]},  # another entry under this name
    ]
    for changes in strange:
        assert_refused(write(tmp_path / "bad", {**parts, **changes}), "is refused")


def test_caches_of_another_layout_are_left_out(plain: Path, home: Home, tmp_path: Path) -> None:
    parts = parts_of(plain)
    name = next(name for name in parts if name.startswith("entries/"))
    fields = json.loads(parts[name])
    fields["fingerprint"]["layout"] = 99
    bad = write(tmp_path / "bad", {**parts, name: json.dumps(fields).encode()})
    report = import_collection(home, bad, allow_unsigned=True)
    assert (report.added, report.entries, report.skipped) == (3, 2, 1)


def test_more_than_the_disk_holds(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_refused: Callable[..., None]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert_refused(plain, "the caches need .* bytes and .* 1000 free; nothing was changed")


@pytest.mark.parametrize("raw", [b"", b"hello", os.urandom(5000), bytes(10_000), b"PK\3\4" * 300])
def test_other_files(raw: bytes, tmp_path: Path, assert_refused: Callable[..., None]) -> None:
    (tmp_path / "bad").write_bytes(raw)
    assert_refused(tmp_path / "bad", "is no kvrag export|is refused")


def test_no_file(home: Home, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            import_collection(home, path, allow_unsigned=True)


# ---- collections that do not fit


@register_embedding_function
class OtherEmbedding(HashedEmbedding):
    @staticmethod
    def name() -> str:
        return "test_other"

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> OtherEmbedding:
        return OtherEmbedding(size=int(config["size"]))


def test_another_embedding_does_not_fit(plain: Path, home: Home) -> None:
    home.index(embedding=HashedEmbedding(64)).close()
    with pytest.raises(
        InputError, match=r"has the embedding 'kvrag_hashed'.*other settings.*nothing was changed"
    ):
        import_collection(home, plain, allow_unsigned=True)


def test_a_collection_with_an_embedding_of_its_own(home: Home, tmp_path: Path) -> None:
    there = Home(tmp_path / "from")
    there.index(embedding=OtherEmbedding(64)).close()
    fill(there)
    export_collection(there, tmp_path / "own.kvrag")
    with pytest.raises(InputError, match="create one with it here first"):
        import_collection(home, tmp_path / "own.kvrag", allow_unsigned=True)
    home.index(embedding=OtherEmbedding(64)).close()
    import_collection(home, tmp_path / "own.kvrag", allow_unsigned=True)
    assert without_owner(content(home)) == without_owner(content(there))


def test_a_collection_behind_neighbours_does_not_fit(plain: Path, home: Home) -> None:
    fill(home, {"d.txt": "The mill at Osk grinds rye."}, context=Context.parse("similar:1"))
    with pytest.raises(InputError, match="by the rule similar:1, the file's by alone"):
        import_collection(home, plain, allow_unsigned=True)


# ---- interruptions


class Stop(BaseException):
    """Ctrl-C at a chosen place."""


@pytest.mark.parametrize(
    "place",
    [
        "kvrag.portable.staging._prove",
        "kvrag.store.references.References.add",
        "kvrag.store.disk.DiskStore.adopt",
        "kvrag.index.Index.add_with_vectors",
        "kvrag.home.Home.take_over",
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_an_interrupted_import_can_be_repeated(
    place: str, which: int, filled: Home, plain: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = place.rpartition(".")
    calls = 0

    def stops(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if which == 0 and calls == 1:
                raise Stop
            found = real(*args, **kwargs)
            if which == 1 and calls == 1:
                raise Stop
            return found

        return call

    with monkeypatch.context() as patch:
        owner: Any = _resolve(module)
        patch.setattr(owner, name, stops(getattr(owner, name)))
        with pytest.raises(Stop):
            import_collection(home, plain, allow_unsigned=True)
    assert not list(home.path.glob("import-*"))
    import_collection(home, plain, allow_unsigned=True)
    assert content(home) == content(filled)
    assert home.store().check().ok


def _resolve(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_what_a_killed_import_left_is_removed(plain: Path, home: Home) -> None:
    left = home.path / "import-dead.partial"
    (left / "store" / "aa").mkdir(parents=True)
    assert abandoned(home) == [left]
    import_collection(home, plain, allow_unsigned=True)
    assert not left.exists()


def test_an_interrupted_export_leaves_nothing(
    filled: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(Writer, "finish", stop)
    with pytest.raises(Stop):
        export_collection(filled, tmp_path / "x.kvrag")
    assert list(tmp_path.iterdir()) == []


def test_an_export_writes_over_nothing(filled: Home, tmp_path: Path) -> None:
    (tmp_path / "x.kvrag").write_text("mine")
    with pytest.raises(InputError, match=r"x.kvrag exists; .*--force"):
        export_collection(filled, tmp_path / "x.kvrag")
    assert (tmp_path / "x.kvrag").read_text() == "mine"
    export_collection(filled, tmp_path / "x.kvrag", replace=True)
    assert (tmp_path / "x.kvrag").stat().st_size > 1000
    with pytest.raises(InputError, match="cannot be written"):
        export_collection(filled, tmp_path / "nowhere" / "x.kvrag")


def test_nobody_writes_during_an_export(
    filled: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any) -> None:
        raise CorpusLocked("another process is writing")

    monkeypatch.setattr(Index, "begin_writing", locked)
    with pytest.raises(CorpusLocked):
        export_collection(filled, tmp_path / "x.kvrag")
    assert list(tmp_path.iterdir()) == []


def test_records_keep_their_vectors(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "chroma")
    vectors = [np.linspace(-1, 1, 1024, dtype=np.float32), None]
    index.add_with_vectors([Record("a", "one", {"n": 1}), Record("b", "two", {})], vectors)
    found = {r.id: (r.metadata, v) for r, v in index.records_with_vectors()}
    np.testing.assert_allclose(found["a"][1], vectors[0], atol=1e-6)  # Chroma's own rounding
    np.testing.assert_allclose(found["b"][1], HashedEmbedding()(["two"])[0], atol=1e-6)
    index.add_with_vectors([Record("a", "one", {"m": 2})], vectors[:1])
    assert index.get(["a"])[0].metadata == {"m": 2}
    index.close()


def test_a_store_adopts_what_it_lacks(filled: Home, tmp_path: Path) -> None:
    shutil.copytree(filled.path / "store", tmp_path / "other")
    store, other = DiskStore(tmp_path / "new"), DiskStore(tmp_path / "other")
    first = next(other.ids())
    assert store.adopt(other, first)
    assert first in store
    assert first not in other
    assert store.check().ok
