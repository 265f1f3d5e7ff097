"""The command line in this process, in an empty folder, with a tiny model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvrag import cli
from kvrag.testing.models import tiny_model, tiny_tokenizer

COMMANDS = ["ingest", "ask", "ls", "rm", "stats", "reconcile", "doctor", "demo"]
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the [bold]Mirrow[/bold] twice a :smile: day."
NOTE = "note: kvrag/reader is a tiny model"


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def object(self) -> Any:
        """The one object on standard output."""
        assert self.status in (0, 1), self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the disk."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, as the installed program runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("KVRAG_HOME", "KVRAG_STORE_KEY", "KVRAG_TENANT_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvrag", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Done(status, printed.out, printed.err)

    return call


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Two files of documents."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(LIGHTHOUSE)
    (folder / "b.md").write_text(FERRY)
    return folder


@pytest.fixture
def ingested(run: Run, notes: Path, model: Path) -> Run:
    assert run("ingest", "notes", "--model", model).status == 0
    return run


@pytest.fixture
def assert_refused() -> Callable[[Done, str], None]:
    """Exit status 2, one line on standard error, nothing on standard output."""

    def check(done: Done, reason: str) -> None:
        assert done.status == 2
        assert done.out == ""
        (line,) = done.err.splitlines()
        assert line.startswith("error: ")
        assert re.search(reason, line), line

    return check
