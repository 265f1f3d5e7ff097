"""Chroma's graph files carry nothing of what the process had in memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from kvrag.graph_files import GraphFiles
from kvrag.index import Index

JUNK = b"what the process had in memory."


def files_of(folder: Path, *names: str) -> list[Path]:
    return [found for name in names for found in folder.rglob(name)]


def spoil(path: Path) -> None:
    """Fill a file as if it had been written from memory that was not cleared."""
    path.write_bytes((JUNK * (path.stat().st_size // len(JUNK) + 1))[: path.stat().st_size])


def test_rows_that_nobody_uses_are_blank_after_a_change(tmp_path: Path) -> None:
    with closing(Index.open(tmp_path, "texts")) as index:
        index.add(["a"], ["one two three"], [{"n": 1}])
        made = files_of(tmp_path, "data_level0.bin", "length.bin")
        assert len(made) == 2
        assert all(not any(path.read_bytes()) for path in made)


def test_what_lies_in_unused_rows_is_overwritten(tmp_path: Path) -> None:
    with closing(Index.open(tmp_path, "texts")) as index:
        index.add(["a"], ["one two three"], [{"n": 1}])
    made = files_of(tmp_path, "data_level0.bin", "length.bin")
    for path in made:
        spoil(path)
    with closing(Index.open(tmp_path, "texts")) as index:
        index.update_metadata(["a"], [{"n": 2}])
        assert all(not any(path.read_bytes()) for path in made)
        assert [hit.id for hit in index.search("two", 1)] == ["a"]


def test_rows_in_use_stay_as_they_are(tmp_path: Path) -> None:
    ids = [str(number) for number in range(1_100)]  # Chroma saves a graph at every thousandth change
    with closing(Index.open(tmp_path, "texts")) as index:
        index.add(ids, [f"text number {n}" for n in ids], [{"n": n} for n in ids])
        vector = index.embed(["text number 7"])[0]
    (rows,) = files_of(tmp_path, "data_level0.bin")
    before = rows.read_bytes()
    assert vector.tobytes() in before
    GraphFiles(tmp_path).blank()
    assert rows.read_bytes() == before
    with closing(Index.open(tmp_path, "texts")) as index:
        assert index.count() == 1_100
        assert index.search("text number 7", 1)[0].id == "7"


@pytest.mark.parametrize("header", [b"", b"short", bytes(100)], ids=["empty", "short", "another version"])
def test_files_of_another_form_are_left_alone(tmp_path: Path, header: bytes) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "header.bin").write_bytes(header)
    (folder / "length.bin").write_bytes(JUNK)
    (folder / "data_level0.bin").write_bytes(JUNK)
    GraphFiles(tmp_path).blank()
    assert (folder / "length.bin").read_bytes() == JUNK
    assert (folder / "data_level0.bin").read_bytes() == JUNK


def test_a_folder_without_graphs_has_nothing_to_do(tmp_path: Path) -> None:
    GraphFiles(tmp_path / "nowhere").blank()


def test_a_file_that_is_missing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Index.open(tmp_path, "texts")) as index:
        index.add(["a"], ["one"], [{"n": 1}])
    (path,) = files_of(tmp_path, "length.bin")
    path.unlink()
    GraphFiles(tmp_path).blank()
    assert "pieces of memory may lie in" in caplog.text
