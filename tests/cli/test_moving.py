"""kvrag export, import and keygen as a person uses them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
