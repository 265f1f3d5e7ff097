"""Tenants of one folder and one model, and a folder that is encrypted: engines, corpora, questions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from kvrag import Tenant
from kvrag.config import Sampling
from kvrag.documents import Document
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.home import Home, ingest
from kvrag.model import Model
from kvrag.rag import Reply, ask
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny

ACME = Tenant("acme", b"a secret of acme, 32 bytes long.")
BOLT = Tenant("bolt", b"a secret of bolt, 32 bytes long.")
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the Mirrow twice a day."
SHORT = Sampling(max_new_tokens=4)


@cache
def model() -> Model:
    return tiny()


def home_of(path: Path, tenant: Tenant | None) -> Home:
    return Home(path / "home", tenant=tenant)


def put(home: Home, *texts: str) -> None:
    with Engine(model(), home.store(), tenant=home.tenant) as engine:
        ingest(home, engine, [Document(text, f"{number}.txt") for number, text in enumerate(texts)])


def reply_of(home: Home, question: str = "When was the lighthouse built?") -> Reply:
    with Engine(model(), home.store(), tenant=home.tenant) as engine, home.corpus(engine) as corpus:
        return ask(engine, corpus, question, k=2, form=home.form(engine), sampling=SHORT).reply()


def texts_of(home: Home) -> list[str]:
    with home.corpus() as corpus:
        return sorted(record.text for record in corpus.documents())


def entries_of(home: Home) -> set[str]:
    return set(home.store().ids())


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Home, Home]:
    """One folder, opened for two tenants, with one text in common."""
    homes = home_of(tmp_path, ACME), home_of(tmp_path, BOLT)
    put(homes[0], LIGHTHOUSE, FERRY)
    put(homes[1], LIGHTHOUSE)
    return homes


def test_tenants_see_their_own_documents_and_caches(homes: tuple[Home, Home]) -> None:
    acme, bolt = homes
    assert texts_of(acme) == sorted([FERRY, LIGHTHOUSE])
    assert texts_of(bolt) == [LIGHTHOUSE]
    assert len(entries_of(acme)) == 3  # one text twice: nothing is shared
    for home in homes:
        reply = reply_of(home)
        assert reply.answer.usage.cached_tokens > 0
        assert reply.sources
        assert all(use.is_hit for use in reply.sources)
    assert len(entries_of(acme)) == 3


def test_removing_reaches_ones_own_only(homes: tuple[Home, Home]) -> None:
    acme, bolt = homes
    with acme.corpus() as corpus:
        corpus.delete([record.id for record in corpus.documents()])
    acme.sweep()
    assert texts_of(acme) == []
    assert texts_of(bolt) == [LIGHTHOUSE]
    assert len(entries_of(bolt)) == 1
    assert all(use.is_hit for use in reply_of(bolt).sources)


def test_reconciling_reaches_ones_own_only(homes: tuple[Home, Home]) -> None:
    acme, bolt = homes
    before = entries_of(acme)
    for home in homes:
        with Engine(model(), home.store(), tenant=home.tenant) as engine, home.corpus(engine) as corpus:
            report = corpus.reconcile()
        assert report.records == len(texts_of(home))
    assert entries_of(bolt) == before


def test_an_engine_of_another_tenant_is_refused(homes: tuple[Home, Home]) -> None:
    acme, _ = homes
    for tenant in (BOLT, None):
        with (
            Engine(model(), acme.store(), tenant=tenant) as engine,
            pytest.raises(ConfigError, match="tenant is not the folder's"),
        ):
            acme.corpus(engine)


def test_answers_are_the_same_for_every_tenant(tmp_path: Path) -> None:
    prompt = f"{LIGHTHOUSE}\n\nWhen was it built?"
    answers = []
    for tenant in (None, ACME, BOLT):
        for is_first in (True, False):
            with Engine(model(), tmp_path / "store", tenant=tenant) as engine:
                found = engine.answer(prompt, [LIGHTHOUSE], sampling=SHORT)
            answers.append(found.text)
            assert [document.is_hit for document in found.documents] == [not is_first]
    assert len(set(answers)) == 1
    assert DiskStore(tmp_path / "store").stats().entries == 3


def test_no_digest_of_a_prompt_is_the_same_for_two(tmp_path: Path) -> None:
    """Else whoever knows a system prompt, or a neighbouring text, would recognise it in a manifest."""
    prints = [model().fingerprint((1, 2, 3), tenant=tenant) for tenant in (None, ACME, BOLT)]
    assert len({fingerprint.prefix for fingerprint in prints}) == 3
    assert len({fingerprint.tenant for fingerprint in prints}) == 3
    assert prints[1] == model().fingerprint((1, 2, 3), tenant=Tenant("acme", ACME.secret))


# ---- encryption


@pytest.fixture
def store_key(monkeypatch: pytest.MonkeyPatch) -> str:
    key = bytes(range(32)).hex()
    monkeypatch.setenv("KVRAG_STORE_KEY", key)
    return key


def test_a_key_in_the_environment_encrypts_the_folders_caches(tmp_path: Path, store_key: str) -> None:
    home = home_of(tmp_path, ACME)
    put(home, LIGHTHOUSE)
    assert all(use.is_hit for use in reply_of(home).sources)
    assert [*home.store().path.glob("*/*.sealed")]
    assert not [*home.store().path.glob("*/*.safetensors")]
    assert home.store().check().ok


def test_another_key_or_none_is_a_clear_error(
    tmp_path: Path, store_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_of(tmp_path, None)
    put(home, LIGHTHOUSE)
    monkeypatch.setenv("KVRAG_STORE_KEY", store_key[::-1])
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        home.store()
    with pytest.raises(ConfigError, match="is encrypted with the key"):
        Engine(model(), home.path / "store")
    monkeypatch.delenv("KVRAG_STORE_KEY")
    with pytest.raises(ConfigError, match="open it with its key"):
        reply_of(home)
    assert home.store().check().ok
    monkeypatch.setenv("KVRAG_STORE_KEY", "not a key")
    with pytest.raises(ConfigError, match="KVRAG_STORE_KEY: a key is"):
        home.store()


def test_answers_from_an_encrypted_store_are_those_of_an_open_one(tmp_path: Path) -> None:
    prompt, answers = f"{FERRY}\n\n{LIGHTHOUSE}\n\nWhen was it built?", []
    for number, ways in enumerate(({}, {"key": bytes(32)}, {"compress": "zstd"})):
        for _ in range(2):
            store = DiskStore(tmp_path / str(number), **ways)
            with Engine(model(), store, tenant=ACME) as engine:
                found = engine.answer(prompt, [LIGHTHOUSE, FERRY], sampling=SHORT)
            answers.append(found.text)
        assert all(document.is_hit for document in found.documents)
    assert len(set(answers)) == 1
