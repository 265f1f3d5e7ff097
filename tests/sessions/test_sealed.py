"""Saved sessions beside an encrypted store: encrypted with its key, or not opened at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag import Engine, Sampling, Session, Tenant
from kvrag.config import store_key
from kvrag.errors import ConfigError, SessionDamaged, SessionError, SessionSealed
from kvrag.memory.cascade import Cascade
from kvrag.model import Model
from kvrag.sessions import container
from kvrag.sessions.rekey import rekey_sessions
from kvrag.sessions.vault import Vault
from kvrag.store.disk import DiskStore
from kvrag.store.files import try_lock
from kvrag.store.sealing import MasterKey
from kvrag.store.tiers import TieredStore
from kvrag.testing.models import tiny

KEY, OTHER = bytes(range(32)), bytes(32)
POLICY = Cascade(52)
SHORT = Sampling(max_new_tokens=6)
SECRET = "The treasure lies under the juniper."
ACME = Tenant("acme", b"a secret of acme, 32 bytes long.")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVRAG_STORE_KEY", raising=False)


@pytest.fixture
def engine(model: Model, tmp_path: Path) -> Iterator[Engine]:
    with engine_of(model, tmp_path, KEY) as made:
        yield made


def engine_of(model: Model, path: Path, key: bytes | None, tenant: Tenant | None = None) -> Engine:
    """With a store of its own for each key: a store has one."""
    name = "plain" if key is None else key.hex()[:4]
    return Engine(model, DiskStore(path / f"store-{name}", key=key), pass_tokens=16, tenant=tenant)


def talked(engine: Engine, num_turns: int = 2, **options: Any) -> Session:
    session = engine.session(POLICY, system="Be brief.", **options)
    for said in [SECRET, "And in winter?", "Since when?"][:num_turns]:
        session.send(said, sampling=SHORT)
    return session


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_nothing_that_was_said_is_in_the_files(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "talks" / "a.session"
    session = talked(engine, name="jane the first")
    session.save(path)
    session.send("One more?", sampling=SHORT)
    session.save(path)
    assert session._talk is not None
    assert session._talk.log is not None
    tokens = session._talk.log[:8].tobytes()
    rows = session._talk.rows.layers[0].keys[0, :4].numpy().tobytes()
    for name, raw in files(path.parent).items():
        for text in (b"juniper", b"brief", b"jane", tokens, rows):
            assert text not in raw, name
    again = engine.load_session(path)
    assert torch.equal(again.logits("Why?"), session.logits("Why?"))
    assert (again.name, again.forgotten()) == ("jane the first", session.forgotten())
    assert [p.name for p in path.parent.glob("*.tokens")] == ["a.session.1.tokens"]
    again.undo(2)
    session.undo(2)
    assert torch.equal(again.logits("Why?"), session.logits("Why?"))


def test_a_session_of_several_pieces(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_PIECE_BYTES", 10_000)
    path = tmp_path / "a.session"
    session = talked(engine)
    session.save(path)
    about, _ = container.heading(path)
    assert len(json.loads(about["blobs"])) > 3
    assert torch.equal(engine.load_session(path).logits("Why?"), session.logits("Why?"))
    raw = bytearray(path.read_bytes())
    sizes = json.loads(about["blobs"])
    start = len(raw) - 16 - sum(sizes[1:])
    second = bytes(raw[start : start + sizes[1]])
    raw[start : start + sizes[1]] = raw[start + sizes[1] : start + 2 * sizes[1]]
    raw[start + sizes[1] : start + 2 * sizes[1]] = second
    path.write_bytes(with_checksum(raw))
    with pytest.raises(SessionDamaged, match="cannot be decrypted"):
        engine.load_session(path)


def with_checksum(raw: bytearray) -> bytes:
    """With the checksum of whoever has changed it on purpose."""
    made = xxhash.xxh3_128(bytes(raw[:-16]))
    return bytes(raw[:-16]) + made.digest()


def test_other_keys_open_nothing_and_change_nothing(model: Model, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "talks" / "a.session"
    talked(engine).save(path)
    before = files(path.parent)
    with (
        engine_of(model, tmp_path, OTHER) as other,
        pytest.raises(SessionSealed, match="encrypted with the key"),
    ):
        other.load_session(path)
    with engine_of(model, tmp_path, None) as other, pytest.raises(SessionSealed, match="KVRAG_STORE_KEY"):
        other.load_session(path)
    with Engine(model) as other, pytest.raises(SessionSealed, match="is encrypted; open it with the key"):
        other.load_session(path)
    assert files(path.parent) == before
    plain = tmp_path / "plain.session"
    with Engine(model, pass_tokens=16) as other:
        talked(other).save(plain)
    with pytest.raises(SessionSealed, match="is not encrypted, and everything here is to be"):
        engine.load_session(plain)


@pytest.mark.parametrize("place", [3, 20, 400, 5000, -30, -5])
def test_damage_is_a_clear_error(engine: Engine, tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.session"
    talked(engine).save(path)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SessionDamaged, match="is not a session, or is damaged"):
        engine.load_session(path)


def test_a_change_on_purpose_is_found_by_the_key(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    talked(engine).save(path)
    raw = bytearray(path.read_bytes())
    raw[-2000] ^= 1
    path.write_bytes(with_checksum(raw))
    with pytest.raises(SessionDamaged, match="cannot be decrypted"):
        engine.load_session(path)


def test_damaged_tokens_are_a_clear_error(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    talked(engine).save(path)
    (log,) = tmp_path.glob("*.tokens")
    whole = log.read_bytes()
    for raw in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole[:10], bytes(len(whole))):
        log.write_bytes(raw)
        with pytest.raises(SessionDamaged):
            engine.load_session(path)
    log.write_bytes(whole + b"half of what a crash has left")
    session = engine.load_session(path)
    session.send("One more?", sampling=SHORT)
    session.save(path)
    assert [p.name for p in tmp_path.glob("*.tokens")] == ["a.session.2.tokens"]
    assert torch.equal(engine.load_session(path).logits("Why?"), session.logits("Why?"))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5), piece=st.integers(1, 40))
def test_any_tensors_come_back(tmp_path: Path, sizes: list[int], piece: int) -> None:
    vault = Vault(MasterKey(KEY), "someone")
    tensors = {f"t{i}": torch.arange(size, dtype=torch.int32) for i, size in enumerate(sizes)}
    tensors["half"] = torch.randn(3, 5).to(torch.bfloat16)
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(container, "_PIECE_BYTES", piece * 10)
        raw = b"".join(container.encoded(tensors, {"a": [1, "b"]}, vault))
    found, manifest = container.decoded(raw, vault, tmp_path)
    assert manifest == {"a": [1, "b"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_parked_sessions_are_encrypted_and_come_back(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    with engine.sessions(folder, POLICY, budget_bytes=0) as sessions:
        for name in ("anna", "bert"):
            sessions[name].send(SECRET, sampling=SHORT)
        assert sessions.num_awake == 0
        assert sessions.names() == ["anna", "bert"]
        assert sessions["anna"].num_turns == 1
    assert not any(text in raw for raw in files(folder).values() for text in (b"juniper", b"anna"))
    with engine.sessions(folder, POLICY) as sessions:
        assert sessions.names() == ["anna", "bert"]
        alone = engine.session(POLICY)
        alone.send(SECRET, sampling=SHORT)
        assert torch.equal(sessions["bert"].logits("Why?"), alone.logits("Why?"))


def test_a_history_never_writes_over_what_another_key_opens(
    model: Model, engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "talks"
    history = [{"role": "user", "content": SECRET}]
    with engine.sessions(folder, POLICY) as sessions:
        sessions["anna"].reply_to(history, sampling=SHORT)
    before = files(folder)
    with engine_of(model, tmp_path, OTHER) as other, other.sessions(folder, POLICY) as sessions:
        with pytest.raises(SessionSealed):
            sessions["anna"].reply_to(history, sampling=SHORT)
        with pytest.raises(SessionSealed):
            sessions.names()
    assert files(folder) == before


def test_the_environments_key_is_for_engines_without_a_store(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.session"
    monkeypatch.setenv("KVRAG_STORE_KEY", KEY.hex())
    with Engine(model, pass_tokens=16) as engine:
        talked(engine).save(path)
    assert b"juniper" not in path.read_bytes()
    assert store_key() == KEY
    monkeypatch.delenv("KVRAG_STORE_KEY")
    store = TieredStore([DiskStore(tmp_path / "store", key=KEY)])
    with Engine(model, store, pass_tokens=16) as engine:
        assert engine.load_session(path).num_turns == 2


def test_beside_an_encrypted_store_nothing_is_written_without_its_key(
    model: Model, engine: Engine, tmp_path: Path
) -> None:
    talked(engine, documents=["The ferry crosses the Mirrow twice a day."])
    with Engine(model, DiskStore(tmp_path / f"store-{KEY.hex()[:4]}"), pass_tokens=16) as other:
        session = other.session(POLICY)
        session.send("Hello", sampling=SHORT)
        with pytest.raises(ConfigError, match="open it with its key"):
            session.save(tmp_path / "a.session")
    assert not (tmp_path / "a.session").exists()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_tenants_share_a_folder_and_know_nothing_of_each_other(
    model: Model, tmp_path: Path, key: bytes | None
) -> None:
    folder = tmp_path / "talks"
    with (
        engine_of(model, tmp_path, key, ACME) as acme,
        engine_of(model, tmp_path, key) as other,
        acme.sessions(folder, POLICY) as one,
        other.sessions(folder, POLICY) as two,
    ):
        one["anna"].send(SECRET, sampling=SHORT)
        assert "anna" not in two
        two["anna"].send("Hello", sampling=SHORT)
        two["bert"].send("Hello", sampling=SHORT)
        one.save()
        two.save()
        assert (one.names(), two.names()) == (["anna"], ["anna", "bert"])
        path = one._path("anna")
        assert path != two._path("anna")
        with pytest.raises(SessionSealed, match="another tenant's"):
            other.load_session(path)
        assert acme.load_session(path).num_turns == 1


def test_other_keys_for_saved_sessions(model: Model, engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    with engine_of(model, tmp_path, None) as plain, plain.sessions(folder, POLICY) as sessions:
        for name in ("anna", "bert"):
            sessions[name].send(SECRET, sampling=SHORT)
        logits = sessions["anna"].logits("Why?")
        sessions.save()
        with pytest.raises(SessionError, match="another process has the session"):
            rekey_sessions(folder, None, KEY)
    with engine_of(model, tmp_path, None, ACME) as plain, plain.sessions(folder, POLICY) as sessions:
        sessions["carl"].send(SECRET, sampling=SHORT)
    (folder / "damaged.session").write_bytes(b"nothing")
    assert rekey_sessions(folder, None, KEY) == 3
    assert not any(b"juniper" in raw for raw in files(folder).values())
    assert rekey_sessions(folder, None, KEY) == 0
    with engine.sessions(folder, POLICY) as sessions:
        assert torch.equal(sessions["anna"].logits("Why?"), logits)
    with engine_of(model, tmp_path, KEY, ACME) as acme, acme.sessions(folder, POLICY) as sessions:
        assert sessions["carl"].num_turns == 1
    with pytest.raises(SessionSealed):
        rekey_sessions(folder, b"x" * 32, b"y" * 32)
    assert rekey_sessions(folder, KEY, OTHER) == 3
    with engine_of(model, tmp_path, OTHER) as other, other.sessions(folder, POLICY) as sessions:
        assert torch.equal(sessions["anna"].logits("Why?"), logits)
    with pytest.raises(ConfigError, match="is the old one"):
        rekey_sessions(folder, KEY, KEY)


def test_a_lock_of_a_conversation_is_heeded(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    talked(engine).save(path)
    held = try_lock(path.with_suffix(".lock"))
    assert held is not None
    with pytest.raises(SessionError, match="another process"):
        rekey_sessions(tmp_path, KEY, OTHER)
    os.close(held)
    assert rekey_sessions(tmp_path, KEY, OTHER) == 1
