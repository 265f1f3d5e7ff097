"""Exports of encrypted stores: nobody reads them without the key, and they arrive under any other."""

from __future__ import annotations

import json
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvrag.config import ALONE
from kvrag.documents import Document
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.home import Home, ingest
from kvrag.model import Model
from kvrag.portable import Refused, export_collection, import_collection, make_keys, private_key, public_key
from kvrag.portable.archive import Archive, Writer
from kvrag.rag import ask
from kvrag.store.disk import DiskStore
from kvrag.store.tenants import Tenant
from kvrag.testing.models import tiny

TEXTS = {
    "a.txt": "The lighthouse of Varn was built in 1871.",
    "b.txt": "A ferry crosses the Mirrow twice a day.",
    "c.txt": "The orchard at Lindal grows apples and plums.",
}
MINE, THEIRS, THIRD = (bytes([n]) * 32 for n in (1, 2, 3))
WORDS = [b"lighthouse", b"Mirrow", b"Lindal", b"tiny 0", b"kvrag_hashed", b"a.txt"]


@cache
def model() -> Model:
    found = tiny()
    found.name = "tiny 0"
    return found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the key of stores, or none."""

    def use(raw: bytes | None) -> None:
        if raw is None:
            monkeypatch.delenv("KVRAG_STORE_KEY", raising=False)
        else:
            monkeypatch.setenv("KVRAG_STORE_KEY", raw.hex())

    use(None)
    return use


def fill(home: Home, *, compress: bool = False, tenant: Tenant | None = None, codec: str = "raw") -> None:
    store = home.store()
    if compress:
        store = DiskStore(store.path, key=store._folder.filters.key and MINE, compress="zstd")
    with Engine(model(), store, tenant=tenant, codec=codec) as engine:
        ingest(home, engine, [Document(text, name) for name, text in TEXTS.items()], context=ALONE)


def files(home: Home) -> dict[str, bytes]:
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in home.path.glob("store/??/*")}


def assert_answers(home: Home) -> None:
    with Engine(model(), home.store(), tenant=home.tenant) as engine, home.corpus(engine) as corpus:
        assert corpus.reconcile().was_equal
        reply = ask(engine, corpus, "Where is the ferry?", k=3, form=home.form(engine)).reply()
        assert all(source.is_hit for source in reply.sources)
    store = home.store()
    assert store.check().ok
    assert store.stats().entries == len(TEXTS)


@pytest.fixture(scope="module")
def sealed_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A folder of three documents whose caches are encrypted; not to be changed."""
    home = Home(tmp_path_factory.mktemp("sealed") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVRAG_STORE_KEY", MINE.hex())
        fill(home)
    return home


@pytest.fixture
def exported(sealed_home: Home, tmp_path: Path, key: Any) -> Path:
    """Its export under the store's own key."""
    key(MINE)
    path = tmp_path / "sealed.kvrag"
    report = export_collection(sealed_home, path)
    assert (report.records, report.entries, report.uncached) == (3, 3, 0)
    assert report.sealed_with is not None
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "there")


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def rewrite(path: Path, parts: dict[str, bytes], seal: bytes) -> None:
    """An archive of these members with right digests, whoever holds the key; `seal` as its sealed list."""
    with path.open("wb") as file:
        writer = Writer(file)
        for name, raw in parts.items():
            if name not in ("manifest.jsonl", "manifest.sealed", "signature.json"):
                writer.add(name, raw)
        writer.finish(None, lambda *_: seal)
        writer.close()


# ---- what can be read of a file


def test_nothing_of_the_documents_can_be_read_in_the_file(exported: Path, tmp_path: Path) -> None:
    raw = exported.read_bytes()
    assert not [word for word in WORDS if word in raw]
    names = list(members(exported))
    assert names[:2] == ["kvrag.json", "records/000000.sealed"]
    assert names[-2:] == ["manifest.jsonl", "manifest.sealed"]
    assert all(name.endswith((".json", ".sealed")) for name in names[2:-2])


def test_caches_are_copied_as_they_lie_under_the_same_key(exported: Path, sealed_home: Home) -> None:
    inside = {n.removeprefix("entries/"): raw for n, raw in members(exported).items() if "entries/" in n}
    assert inside == {n.split("/")[1]: raw for n, raw in files(sealed_home).items()}


def test_two_exports_have_no_sealed_member_in_common(exported: Path, sealed_home: Home) -> None:
    export_collection(sealed_home, exported.with_name("again"))
    before, after = members(exported), members(exported.with_name("again"))
    for name in ("records/000000.sealed", "manifest.sealed"):
        assert before[name] != after[name]


# ---- there, under any key


def test_to_a_store_with_the_same_key(exported: Path, home: Home, sealed_home: Home) -> None:
    report = import_collection(home, exported, allow_unsigned=True)
    assert (report.added, report.entries, report.skipped, report.unusable) == (3, 3, 0, 0)
    assert list(report.made_by.values()) == [3]
    assert report.sealed_with is not None
    assert files(home) == files(sealed_home)
    assert home.settings() == sealed_home.settings()
    assert_answers(home)


@pytest.mark.parametrize("compress", [False, True])
def test_to_a_store_with_another_key(compress: bool, home: Home, tmp_path: Path, key: Any) -> None:
    key(MINE)
    there = Home(tmp_path / "from")
    fill(there, compress=compress)
    export_collection(there, tmp_path / "x")
    key(THEIRS)
    report = import_collection(home, tmp_path / "x", allow_unsigned=True, seal_key=MINE)
    assert (report.added, report.entries) == (3, 3)
    assert set(files(home)) == set(files(there))
    assert all(raw != files(there)[name] for name, raw in files(home).items())
    assert_answers(home)
    key(MINE)
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        home.store()
    key(THEIRS)
    again = import_collection(home, tmp_path / "x", allow_unsigned=True, seal_key=MINE)
    assert (again.added, again.entries, again.known) == (0, 0, 3)


def test_under_a_key_of_its_own(sealed_home: Home, home: Home, tmp_path: Path, key: Any) -> None:
    key(MINE)
    report = export_collection(sealed_home, tmp_path / "x", seal_key=THIRD)
    assert report.entries == 3
    with pytest.raises(Refused, match=r"sealed with the key \w{8}, given was \w{8}; name its key"):
        import_collection(home, tmp_path / "x", allow_unsigned=True)
    assert not home.path.exists()
    import_collection(home, tmp_path / "x", allow_unsigned=True, seal_key=THIRD)
    assert_answers(home)


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("compress", [False, True])
def test_there_and_back_are_the_same_bytes(
    codec: str, compress: bool, home: Home, tmp_path: Path, key: Any
) -> None:
    """Open, sealed, sealed under another key, open: manifests and data as they were."""
    there = Home(tmp_path / "from")
    fill(there, compress=compress, codec=codec)
    export_collection(there, tmp_path / "1", seal_key=MINE)
    key(THEIRS)
    second = Home(tmp_path / "second")
    import_collection(second, tmp_path / "1", allow_unsigned=True, seal_key=MINE)
    export_collection(second, tmp_path / "2")
    key(None)
    import_collection(home, tmp_path / "2", allow_unsigned=True, seal_key=THEIRS)
    assert files(home) == files(there)
    assert home.store().check().ok


def test_a_plain_file_goes_into_an_encrypted_store(home: Home, tmp_path: Path, key: Any) -> None:
    there = Home(tmp_path / "from")
    fill(there)
    assert export_collection(there, tmp_path / "x").sealed_with is None
    key(MINE)
    with pytest.raises(Refused, match="not sealed, and a key was given"):
        import_collection(home, tmp_path / "x", allow_unsigned=True, seal_key=MINE)
    assert not home.path.exists()
    assert import_collection(home, tmp_path / "x", allow_unsigned=True).entries == 3
    assert all(name.endswith((".json", ".sealed")) for name in files(home))
    assert_answers(home)


def test_plain_has_to_be_asked_for(sealed_home: Home, home: Home, tmp_path: Path, key: Any) -> None:
    key(MINE)
    report = export_collection(sealed_home, tmp_path / "x", plain=True)
    assert (report.entries, report.sealed_with) == (3, None)
    assert b"lighthouse" in (tmp_path / "x").read_bytes()
    with pytest.raises(ConfigError, match="either plain or sealed"):
        export_collection(sealed_home, tmp_path / "y", plain=True, seal_key=MINE)
    key(None)
    import_collection(home, tmp_path / "x", allow_unsigned=True)
    assert_answers(home)


def test_a_tenant_goes_along(home: Home, tmp_path: Path, key: Any) -> None:
    key(MINE)
    tenant = Tenant("acme", b"s" * 32)
    there = Home(tmp_path / "from", tenant=tenant)
    fill(there, tenant=tenant)
    export_collection(there, tmp_path / "x")
    key(THEIRS)
    arrived = Home(tmp_path / "there", tenant=tenant)
    assert import_collection(arrived, tmp_path / "x", allow_unsigned=True, seal_key=MINE).entries == 3
    assert_answers(arrived)


def test_the_signature_needs_no_key(sealed_home: Home, home: Home, tmp_path: Path, key: Any) -> None:
    key(MINE)
    _, line = make_keys(tmp_path / "mine")
    export_collection(sealed_home, tmp_path / "x", key=private_key(tmp_path / "mine"))
    archive = Archive(tmp_path / "x")
    assert archive.signer() == public_key(line)
    archive.close()
    with pytest.raises(Refused, match="not trusted here"):
        import_collection(home, tmp_path / "x")
    assert import_collection(home, tmp_path / "x", trust=[public_key(line)]).signer == line


# ---- without the key, or with another


def test_without_its_key_nothing_is_exported(sealed_home: Home, tmp_path: Path, key: Any) -> None:
    for seal_key in (None, THIRD):
        with pytest.raises(ConfigError, match="set KVRAG_STORE_KEY to their key"):
            export_collection(sealed_home, tmp_path / "x", seal_key=seal_key)
    with pytest.raises(ConfigError, match="set KVRAG_STORE_KEY to their key"):
        export_collection(Home(sealed_home.path), tmp_path / "x", seal_key=MINE)
    key(THEIRS)
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        export_collection(sealed_home, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_without_its_key_nothing_is_imported(exported: Path, home: Home, key: Any) -> None:
    key(None)
    with pytest.raises(Refused, match=r"sealed with the key \w{8}, and none was given; add --key") as caught:
        import_collection(home, exported, allow_unsigned=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match=r"sealed with the key \w{8}, given was \w{8}"):
        import_collection(home, exported, allow_unsigned=True, seal_key=THEIRS)
    assert not home.path.exists()


def test_into_a_store_whose_key_is_not_given(exported: Path, tmp_path: Path, key: Any) -> None:
    key(THEIRS)
    full = Home(tmp_path / "full")
    fill(full)
    before = files(full)
    key(None)
    with pytest.raises(ConfigError, match=r"set KVRAG_STORE_KEY.*nothing was changed"):
        import_collection(full, exported, allow_unsigned=True, seal_key=MINE)
    assert files(full) == before


# ---- files that were changed


def test_no_changed_byte_gets_through(exported: Path, home: Home, tmp_path: Path) -> None:
    raw = exported.read_bytes()
    places = {*range(0, len(raw), max(1, len(raw) // 150))}
    archive = Archive(exported)
    for member, pieces in archive.members():
        list(pieces)
        places |= {member.start, member.start + member.size - 1}
    archive.close()
    for at in sorted(places):
        (tmp_path / "bad").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(InputError):
            import_collection(home, tmp_path / "bad", allow_unsigned=True)
    assert not home.path.exists()


def test_without_the_key_no_member_is_left_out_changed_or_exchanged(
    exported: Path, sealed_home: Home, home: Home, tmp_path: Path
) -> None:
    """Whoever makes all digests anew cannot make the sealed list."""
    export_collection(sealed_home, tmp_path / "other")
    parts, other = members(exported), members(tmp_path / "other")
    seal = parts["manifest.sealed"]
    caches = [name for name in parts if name.startswith("entries/")]
    for changed, theirs in [
        ({n: raw for n, raw in parts.items() if n not in caches[:2]}, seal),
        ({**parts, "records/000000.sealed": other["records/000000.sealed"]}, seal),
        ({**parts, "kvrag.json": other["kvrag.json"]}, other["manifest.sealed"]),
        (parts, other["manifest.sealed"]),
        (parts, b""),
    ]:
        rewrite(tmp_path / "bad", changed, theirs)
        with pytest.raises(Refused, match="is refused"):
            import_collection(home, tmp_path / "bad", allow_unsigned=True)
    rewrite(tmp_path / "bad", parts, seal)
    assert import_collection(home, tmp_path / "bad", allow_unsigned=True).added == 3


@pytest.mark.parametrize(
    "sealed",
    [None, 7, [], {}, {"cipher": "none", "key_id": "", "file": ""}, {"cipher": "aes256gcm", "file": "../x"}],
)
def test_strange_heads(sealed: Any, exported: Path, home: Home, tmp_path: Path) -> None:
    parts = members(exported)
    head = json.loads(parts["kvrag.json"])
    for changed in ({**head, "sealed": sealed}, {**head, "version": 1}, {**head, "private": "§"}):
        rewrite(tmp_path / "bad", {**parts, "kvrag.json": json.dumps(changed).encode()}, b"x" * 60)
        with pytest.raises(Refused, match="is refused"):
            import_collection(home, tmp_path / "bad", allow_unsigned=True)
    assert not home.path.exists()


def test_an_interrupted_import_leaves_no_text_behind(
    exported: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed import leaves in its folder is sealed as the file was."""
    seen: list[bytes] = []
    real = shutil.rmtree

    def look(path: Any, *args: Any, **kwargs: Any) -> None:
        seen.extend(file.read_bytes() for file in Path(path).rglob("*") if file.is_file())
        real(path, *args, **kwargs)

    monkeypatch.setattr("kvrag.portable.staging.shutil.rmtree", look)
    monkeypatch.setattr("kvrag.portable.incoming._commit", lambda *_, **__: (0, 0, 0))
    import_collection(home, exported, allow_unsigned=True)
    assert len(seen) > len(TEXTS)
    assert not [word for word in WORDS for raw in seen if word in raw]
