"""kvrag export, import and keygen as a person uses them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrag.keys import write_key

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]


def test_there_and_back(ingested: Run, assert_refused: Refused) -> None:
    done = ingested("keygen", "mine")
    assert done.status == 0
    assert Path("mine.pub").read_text().strip() in done.out
    done = ingested("export", "notes.kvrag", "--sign", "mine")
    assert done.out.startswith("2 chunks, 2 caches, ")
    assert "signed by kvrag-ed25519:" in done.out
    assert (done.status, done.err) == (0, "")
    assert_refused(ingested("export", "notes.kvrag"), "notes.kvrag exists; .*--force")
    assert ingested("export", "notes.kvrag", "--sign", "mine", "--force", "--json").object["entries"] == 2

    assert_refused(ingested("import", "notes.kvrag", "--home", "new"), "not trusted here.*--trust")
    assert not Path("new").exists()
    done = ingested("import", "notes.kvrag", "--home", "new", "--trust", "mine.pub")
    assert done.out.startswith("2 chunks: 2 added; 2 caches added\n")
    found = ingested("ask", "Who?", "--home", "new", "--max-new-tokens", "2", "--json").object
    assert all(source["is_hit"] for source in found["sources"])
    assert ingested("verify", "--home", "new").status == 0
    line = Path("mine.pub").read_text().strip()
    found = ingested("import", "notes.kvrag", "--home", "new", "--trust", line, "--json").object
    assert (found["added"], found["entries"], found["known"]) == (0, 0, 2)


def test_what_a_model_can_use(ingested: Run, model: Path) -> None:
    ingested("export", "notes.kvrag")
    options = ("import", "notes.kvrag", "--allow-unsigned", "--model", model)
    assert ingested(*options, "--home", "same", "--json").object["unusable"] == 0
    done = ingested(*options, "--home", "half", "--dtype", "bfloat16")
    assert "cannot use 2 of them here (other weights or dtype)" in done.err
    done = ingested(*options, "--home", "none", "--dtype", "bfloat16", "--usable-only")
    assert "2 caches were left out" in done.err
    assert ingested("stats", "--home", "none", "--json").object["entries"] == 0


def test_chunks_without_caches_are_said(ingested: Run) -> None:
    shutil.rmtree(".kvrag/store")
    done = ingested("export", "bare.kvrag")
    assert done.status == 0
    assert "2 chunks have no cache, and are exported without" in done.err


def test_encrypted_caches_to_a_machine_with_another_key(
    run: Run, notes: Path, model: Path, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here.key", "there.key", "parcel.key"):
        assert run("keygen", name, "--secret").out.startswith(f"{name} encrypts")
    assert_refused(run("keygen", "here.key", "--secret"), "exists already")
    monkeypatch.setenv("KVRAG_STORE_KEY", "here.key")
    assert run("ingest", "notes", "--model", model).status == 0
    done = run("export", "notes.kvrag", "--key", "parcel.key")
    assert (done.status, done.err) == (0, "")
    assert "\nsealed with the key " in done.out
    assert b"lighthouse" not in Path("notes.kvrag").read_bytes()

    monkeypatch.setenv("KVRAG_STORE_KEY", "there.key")
    there = ("import", "notes.kvrag", "--home", "new", "--allow-unsigned")
    assert_refused(run(*there), r"sealed with the key \w{8}, given was \w{8}; name its key with --key")
    assert_refused(run(*there, "--key", "nowhere"), "nowhere: no such file; kvrag keygen --secret")
    assert_refused(run(*there, "--key", "notes.kvrag"), "notes.kvrag: ")
    assert not Path("new").exists()
    done = run(*there, "--key", "parcel.key")
    assert done.out.startswith("2 chunks: 2 added; 2 caches added\n")
    found = run("ask", "Who?", "--home", "new", "--max-new-tokens", "2", "--json").object
    assert all(source["is_hit"] for source in found["sources"])


def test_a_plain_file_of_encrypted_caches_is_pointed_out(
    run: Run, notes: Path, model: Path, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRAG_STORE_KEY", write_key("here.key").hex())
    assert run("ingest", "notes", "--model", model).status == 0
    done = run("export", "plain.kvrag", "--plain")
    assert done.err == "note: plain.kvrag is not sealed: whoever has it can read documents and caches\n"
    assert_refused(run("export", "x.kvrag", "--plain", "--key", "here.key"), "either plain or sealed")
    monkeypatch.delenv("KVRAG_STORE_KEY")
    assert_refused(run("export", "x.kvrag"), "set KVRAG_STORE_KEY to their key")
    assert run("import", "plain.kvrag", "--home", "new", "--allow-unsigned", "--json").object["entries"] == 2
