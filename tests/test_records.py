"""Records in a file: what goes in comes out, names by prefix, and what is said when it cannot be."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag import CorpusError, InputError, StoreWriteError
from kvrag.records import Record, RecordFile, written

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[RecordFile]:
    made = RecordFile(tmp_path / "kept")
    yield made
    made.close()


def put(file: RecordFile, **texts: str) -> None:
    with file.writing():
        file.put({name: written(name, Record(text, {})) for name, text in texts.items()})


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(NAMES, st.tuples(st.text(), st.dictionaries(st.text(), PLAIN, max_size=3)), max_size=5)
)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    records = {name: Record(text, fields) for name, (text, fields) in given.items()}
    folder = tmp_path_factory.mktemp("kept")
    file = RecordFile(folder)
    with file.writing():
        file.put({name: written(name, record) for name, record in records.items()})
    file.close()
    again = RecordFile(folder)
    assert again.get([*records, "nobody's name"]) == records
    assert dict(again.records()) == records
    assert again.count() == len(records)
    assert again.id == file.id
    again.close()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text("ab\0\U0010ffff", max_size=4), max_size=12), st.text("ab\0\U0010ffff", max_size=3))
def test_names_by_prefix(tmp_path_factory: pytest.TempPathFactory, names: set[str], prefix: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvrag.records._PAGE", 3)
        file = RecordFile(tmp_path_factory.mktemp("kept"))
        with file.writing():
            file.put(dict.fromkeys(names, "{}"))
        found = [name for page in file.names(prefix) for name in page]
        file.close()
    assert found == sorted((name for name in names if name.startswith(prefix)), key=str.encode)


def test_a_change_is_whole_or_nothing(file: RecordFile) -> None:
    put(file, a="one")

    def half() -> None:
        with file.writing():
            file.put({"b": written("b", Record("two", {}))})
            file.remove(["a"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert dict(file.records()) == {"a": Record("one", {})}


def test_what_is_deleted_or_replaced_is_overwritten(file: RecordFile) -> None:
    put(file, a="the first secret", b="the second secret", c="stays")
    put(file, a="replaced")
    with file.writing():
        file.remove(["b"])
    left = b"".join(path.read_bytes() for path in file.path.parent.iterdir())
    assert b"secret" not in left
    assert b"stays" in left


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: "a"}, {"a": {1, 2}}, float("nan"), [float("inf")], b"bytes", object, {"a": [(1,)]}],
    ids=repr,
)
def test_what_json_would_change_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"'a': metadata is not kept as it is by JSON; use text"):
        written("a", Record("text", {"metadata": value}))


def test_what_refers_to_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError, match="not kept as it is"):
        written("a", Record("text", {"loop": loop}))


def test_foreign_damaged_and_later_files_are_told_apart_from_ours(tmp_path: Path) -> None:
    for name in ("text", "later", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "text/records.sqlite").write_text(
        "Not a database, but long enough to be taken for one. " * 40
    )
    with pytest.raises(CorpusError, match=r"is damaged, or not a file of kvrag's .*: restore it"):
        RecordFile(tmp_path / "text")
    for name, change in (
        ("later", "UPDATE about SET value = '2' WHERE name = 'version'"),
        ("bad", "INSERT INTO records VALUES ('a', '[]')"),
    ):
        RecordFile(tmp_path / name).close()
        with sqlite3.connect(tmp_path / name / "records.sqlite") as db:
            db.execute(change)
        db.close()
    with pytest.raises(CorpusError, match="another version of kvrag"):
        RecordFile(tmp_path / "later")
    bad = RecordFile(tmp_path / "bad")
    with pytest.raises(CorpusError, match="is damaged"):
        bad.get(["a"])
    bad.close()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StoreWriteError, OSError), match="cannot write"):
        RecordFile(tmp_path / "file" / "folder")


_WRITE = """
import sys
from kvrag.records import Record, RecordFile, written
file = RecordFile(sys.argv[1])
for n in range(20):
    with file.writing():
        count = len(file.get(["count"])) and int(file.get(["count"])["count"].text)
        file.put({"count": written("count", Record(str(count + 1), {}))})
print(file.id)
"""


def test_processes_that_open_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    others = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITE, str(tmp_path / "kept")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ids = {other.communicate()[0] for other in others}
    assert [other.returncode for other in others] == [0] * 3
    file = RecordFile(tmp_path / "kept")
    assert ids == {f"{file.id}\n"}
    assert file.get(["count"])["count"].text == "60"
    file.close()
