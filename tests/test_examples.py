"""Notebooks and scripts in examples/ run as they stand; what notebooks store is the output of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import chromadb
import pytest

from kvrag import InputError
from kvrag.embedding import HashedEmbedding
from kvrag.reader.collection import documents

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

# Fewer questions where a notebook measures with many.
PARAMETERS: dict[str, dict[str, Any]] = {"06_choosing": {"QUESTIONS": 2}}


def loaded(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    """The script that stores outputs, which runs them the same way."""
    return loaded("refresh")


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the notebook's machinery; the notebook's own are looked at below
def test_notebooks_run(path: Path, refresh: ModuleType, tmp_path: Path) -> None:
    ran = refresh.run(path, tmp_path, **PARAMETERS.get(path.stem, {}))
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    said = [output for cell in code for output in cell.outputs]
    assert [o.text for o in said if o.output_type == "stream" and o.name == "stderr"] == []
    stored = [cell for cell in refresh.nbformat.read(path, 4).cells if cell.cell_type == "code"]
    pictures = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in stored]
    injected = [cell for cell in code if "injected-parameters" not in cell.metadata.get("tags", ())]
    assert [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in injected] == pictures
    assert sum(pictures) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_are_clean(path: Path, refresh: ModuleType) -> None:
    notebook = refresh.nbformat.read(path, 4)
    refresh.nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {o.output_type if o.output_type != "stream" else o.name for cell in code for o in cell.outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert 'MODEL = "kvrag/reader"' in code[0].source
    text = path.read_text()
    assert [
        place for place in ("/home/", "/Users/", "/tmp/", "/work/", "site-packages") if place in text
    ] == []
    assert len(text) < 400_000
    assert refresh.clean(refresh.nbformat.read(path, 4)).metadata == notebook.metadata


def script(name: str, folder: Path, *arguments: str) -> str:
    """What a script prints, run as people run it."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The same in this process, which is faster."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        loaded(name).main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for document in documents(num=8):
        (folder / f"{document.title}.txt").write_text(document.text)
    return folder


@pytest.fixture
def address(notes: Path, tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, EXAMPLES / "one_file_rag.py", notes, "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stdout is not None
        assert "8 of them read now" in server.stdout.readline()
        yield server.stdout.readline().strip()
        server.terminate()


def test_one_file_rag_serves(address: str) -> None:
    with urllib.request.urlopen(address) as page:
        assert b"<form" in page.read()
    with urllib.request.urlopen(f"{address}/ask", data=b"What is Neiia Kleiski's hobby?") as answered:
        said = answered.read().decode()
    assert said.startswith("The hobby of Neiia Kleiski is judo.")
    assert "Neiia Kleiski.txt" in said
    assert "tokens cached" in said
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(f"{address}/ask", data=b" ")
    with refused.value:
        assert "the question is empty" in refused.value.read().decode()


def test_one_file_rag_answers_and_reads_nothing_twice(
    notes: Path, tmp_path: Path, again: Callable[..., str]
) -> None:
    question = ("--ask", "What is Neiia Kleiski's hobby?")
    first = script("one_file_rag", tmp_path, "notes", *question)
    assert "8 of them read now" in first
    assert "The hobby of Neiia Kleiski is judo." in first
    assert "0 of them read now" in again("one_file_rag", "notes", *question)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        again("one_file_rag", "nowhere")


def test_warm_chroma_leaves_the_collection_as_it_was(tmp_path: Path, again: Callable[..., str]) -> None:
    client = chromadb.PersistentClient(str(tmp_path / "chroma"))
    collection = client.create_collection("old", embedding_function=HashedEmbedding())
    texts = [document.text for document in documents(num=8)]
    collection.add(ids=[str(n) for n in range(8)], documents=texts, metadatas=[{"n": n} for n in range(8)])
    before = collection.get()
    first = script("warm_chroma", tmp_path, "chroma", "old", "--ask", "What is Neiia Kleiski's hobby?")
    assert "8 documents: 8 read now, 0 were there" in first
    assert "The hobby of Neiia Kleiski is judo." in first
    assert "8 documents: 0 read now, 8 were there" in again("warm_chroma", "chroma", "old")
    assert collection.get() == before
    with pytest.raises(InputError, match="there is no collection 'new' in chroma"):
        again("warm_chroma", "chroma", "new")


def test_pictures_of_the_documentation_are_drawn(tmp_path: Path, again: Callable[..., str]) -> None:
    again("pictures", str(tmp_path))
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    stored = EXAMPLES.parent / "docs" / "img"
    measured = ("quality-", "memory-")  # drawn by benchmarks/report.py
    assert drawn == {p.name for p in stored.glob("*.svg") if not p.name.startswith(measured)}
    assert "Stuville" in (tmp_path / "result.svg").read_text()
