"""Commands of tenants, and of a folder that is encrypted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrag.keys import write_key

Run = Callable[..., Any]


def test_tenants_have_documents_of_their_own(
    run: Run, notes: Path, model: Path, assert_refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {name: write_key(tmp_path / f"{name}.key") for name in ("acme", "bolt")}
    assert_refused(run("ingest", notes, "--model", model, "--tenant", "acme"), "KVRAG_TENANT_KEY is not")
    for name, files in (("acme", ["a.txt", "b.md"]), ("bolt", ["a.txt"])):
        monkeypatch.setenv("KVRAG_TENANT_KEY", str(tmp_path / f"{name}.key"))
        paths = [notes / file for file in files]
        assert run("ingest", *paths, "--model", model, "--tenant", name, "--json").object["added"] == len(
            files
        )
        assert len(run("ls", "--tenant", name, "--json").object) == len(files)
    assert_refused(run("ls"), "--tenant is not")
    ids = [record["id"] for record in run("ls", "--tenant", "bolt", "--json").object]
    assert run("rm", *ids, "--tenant", "bolt").status == 0
    assert run("ls", "--tenant", "bolt", "--json").object == []
    monkeypatch.setenv("KVRAG_TENANT_KEY", keys["acme"].hex())
    reply = run(
        "ask", "When was the lighthouse built?", "--tenant", "acme", "--json", "--max-new-tokens", "2"
    ).object
    assert len(reply["sources"]) == 2
    assert all(source["is_hit"] for source in reply["sources"])
    monkeypatch.setenv("KVRAG_TENANT_KEY", keys["bolt"].hex())  # the right name with another secret
    assert_refused(run("ls", "--tenant", "acme"), "or has it with another secret")
    monkeypatch.delenv("KVRAG_TENANT_KEY")
    assert_refused(run("ls"), "there is no collection 'kvrag'")


def test_a_key_in_the_environment_encrypts_the_caches(
    run: Run, notes: Path, model: Path, assert_refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVRAG_STORE_KEY", write_key(tmp_path / "key").hex())
    assert run("ingest", notes, "--model", model).status == 0
    assert list(tmp_path.glob(".kvrag/store/*/*.sealed"))
    assert run("ask", "When?", "--max-new-tokens", "2").status == 0
    assert run("verify").status == 0
    monkeypatch.setenv("KVRAG_STORE_KEY", "0" * 64)
    assert_refused(run("ask", "When?"), "is encrypted with the key")
    monkeypatch.setenv("KVRAG_STORE_KEY", "0")
    assert_refused(run("ask", "When?"), "KVRAG_STORE_KEY: a key is 64 hexadecimal digits")
