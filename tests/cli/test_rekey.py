"""kvrag rekey: everything in a folder is under the new key, and nothing under the one before."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvrag.archive.rekey import rekey_archive
from kvrag.home import Home
from kvrag.index import Index
from kvrag.keys import read_key
from kvrag.rekeying import Renewed, rekey_home
from kvrag.store.rekey import rekey

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
SAID = ["The key lies under the juniper.", "Who keeps the lighthouse?", "And in winter?"]


@pytest.fixture
def sealed(run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A folder whose caches, conversation and archive are encrypted with here.key."""
    for name in ("here.key", "new.key", "third.key", "acme.key"):
        assert run("keygen", name, "--secret").status == 0
    monkeypatch.setenv("KVRAG_STORE_KEY", "here.key")
    assert run("ingest", "notes", "--model", model).status == 0
    talk(run, monkeypatch)
    return run


def talk(run: Run, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """Say some things to jane's session."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in SAID)))
    how = ("--session", "jane", "--archive", "--max-new-tokens", "6", "--memory", "window", "--budget", "48")
    done = run("chat", *how, *options)
    assert done.status == 0, done.err
    return done


def raw() -> bytes:
    return b"".join(file.read_bytes() for file in Path(".kvrag").rglob("*") if file.is_file())


def test_everything_is_under_the_new_key(
    sealed: Run, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sealed("ask", "Where is the ferry?", "--json").object
    done = sealed("rekey", "new.key")
    assert done.status == 0
    # Two documents, and what was said three times.
    expected = "5 caches, 1 conversation, 3 spans encrypted anew; from now on: KVRAG_STORE_KEY=new.key\n"
    assert done.out == expected
    for command in (["ask", "Where?"], ["stats"]):
        assert_refused(sealed(*command), "is encrypted with the key")
    monkeypatch.setenv("KVRAG_STORE_KEY", "new.key")
    assert sealed("ask", "Where is the ferry?", "--json").object["answer"] == before["answer"]
    assert sealed("verify", "--json").object["ok"]
    (session,) = sealed("sessions", "--json").object["sessions"]
    assert (session["name"], session["num_turns"]) == ("jane", len(SAID))
    talk(sealed, monkeypatch)
    (session,) = sealed("sessions", "--json").object["sessions"]
    assert session["num_turns"] == 2 * len(SAID)
    assert b"juniper" not in raw()


def test_tenants_and_other_collections_are_not_forgotten(
    sealed: Run, model: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRAG_TENANT_KEY", "acme.key")
    assert sealed("ingest", "notes", "--model", model, "--tenant", "acme").status == 0
    talk(sealed, monkeypatch, "--tenant", "acme")
    monkeypatch.delenv("KVRAG_TENANT_KEY")
    assert len(Home(".kvrag").sealed_archives()[1]) == 2
    found = sealed("rekey", "new.key", "--json").object
    assert found == {"entries": 10, "sessions": 2, "spans": 6}
    monkeypatch.setenv("KVRAG_STORE_KEY", "new.key")
    monkeypatch.setenv("KVRAG_TENANT_KEY", "acme.key")
    talk(sealed, monkeypatch, "--tenant", "acme")
    assert sealed("ask", "Where?", "--tenant", "acme", "--json").object["sources"]


def test_interrupted_it_goes_on(sealed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home, (old, new) = Home(".kvrag"), (read_key("here.key"), read_key("new.key"))

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 5)
        raise Stopped

    with pytest.raises(Stopped):
        rekey_home(home, old, new, progress=stop)
    assert sealed("rekey", "new.key", "--json").object == {"entries": 4, "sessions": 0, "spans": 0}
    assert rekey_home(home, old, new) == Renewed(0, 0, 0)
    assert sealed("rekey", "new.key").out.startswith("nothing was left to encrypt anew; ")
    monkeypatch.setenv("KVRAG_STORE_KEY", "new.key")
    assert sealed("verify", "--json").object["ok"]


def test_collections_that_are_no_archives_stay_as_they_are(
    sealed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server archives lie among collections of documents, whose names may end alike."""
    database, before = Home(".kvrag").sealed_archives()
    with closing(Index.open(database, "notes-archive")) as index:
        index.add(["a"], ["Nothing to do with chats."], [{"n": 1}])
    with closing(Index.open(database, "empty-archive")):
        pass
    assert Home(".kvrag").sealed_archives() == (database, before)
    assert sealed("rekey", "new.key", "--json").object == {"entries": 5, "sessions": 1, "spans": 3}
    with closing(Index.open(database, "notes-archive")) as index:
        (left,) = index.get(["a"])
    assert (left.text, left.metadata) == ("Nothing to do with chats.", {"n": 1})
    monkeypatch.setenv("KVRAG_STORE_KEY", "new.key")
    talk(sealed, monkeypatch)


def test_what_was_begun_by_hand_is_finished(sealed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home, (old, new) = Home(".kvrag"), (read_key("here.key"), read_key("new.key"))
    rekey(home.path / "store", old, new)
    database, (name,) = home.sealed_archives()
    assert rekey_archive(database, old, new, collection=name) >= 2
    assert sealed("rekey", "new.key", "--json").object == {"entries": 0, "sessions": 1, "spans": 0}
    monkeypatch.setenv("KVRAG_STORE_KEY", "new.key")
    talk(sealed, monkeypatch)


def test_wrong_keys_change_nothing(
    sealed: Run, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = raw()
    assert_refused(sealed("rekey", "here.key"), "the new key is the old one")
    assert_refused(sealed("rekey", "nowhere.key"), "no such file; kvrag keygen --secret FILE")
    monkeypatch.setenv("KVRAG_STORE_KEY", "third.key")
    assert_refused(sealed("rekey", "new.key"), r"are encrypted with the key \w{8}, and neither \w{8}")
    monkeypatch.delenv("KVRAG_STORE_KEY")
    assert_refused(sealed("rekey", "new.key"), "KVRAG_STORE_KEY is not set")
    assert raw() == before


def test_caches_that_are_not_encrypted_are_refused(
    ingested: Run, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here.key", "new.key"):
        ingested("keygen", name, "--secret")
    monkeypatch.setenv("KVRAG_STORE_KEY", "here.key")
    assert_refused(ingested("rekey", "new.key"), "are not encrypted; only a new store can be")


def test_an_empty_folder_has_nothing_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here.key", "new.key"):
        run("keygen", name, "--secret")
    monkeypatch.setenv("KVRAG_STORE_KEY", "here.key")
    assert run("rekey", "new.key", "--json").object == {"entries": 0, "sessions": 0, "spans": 0}
    assert not Path(".kvrag").exists()
