import subprocess
import sys
from pathlib import Path

import pytest

from kvrag.errors import StoreWriteError
from kvrag.store.references import References


@pytest.fixture(params=["file", "memory"])
def references(request: pytest.FixtureRequest, tmp_path: Path):
    references = References(tmp_path / "a" / "references.sqlite" if request.param == "file" else None)
    yield references
    references.close()


def test_counting(references: References) -> None:
    assert references.of("one") == {}
    assert references.count("x") == 0
    assert references.add("one", {"a": "x", "b": "x"}) == []
    assert references.add("two", {"a": "x"}) == []
    assert references.count("x") == 3
    assert references.of("one") == {"a": "x", "b": "x"}
    assert references.remove("one", ["a", "b", "unknown"]) == []
    assert references.remove("two", ["a"]) == ["x"]
    assert references.remove("two", ["a"]) == []
    assert references.of("two") == {}


def test_replacing_frees_what_was_referred_to(references: References) -> None:
    references.add("one", {"a": "x", "b": "y"})
    assert references.add("one", {"a": "x"}) == []
    assert references.add("one", {"a": "z"}) == ["x"]
    assert references.add("one", {"a": "y", "b": "z"}) == []


def test_collect_deletes_what_nobody_refers_to(references: References) -> None:
    references.add("one", {"a": "x"})
    gone = []
    assert references.collect(["x", "y", "y", "z"], lambda key: gone.append(key) or key == "y") == ["y"]
    assert gone == ["y", "z"]


def test_an_error_changes_nothing(references: References) -> None:
    references.add("one", {"a": "x"})

    def fail(_: str) -> bool:
        raise StoreWriteError(28, "full")

    with pytest.raises(StoreWriteError, match="full"):
        references.collect(["y"], fail)
    assert references.of("one") == {"a": "x"}
    references.add("one", {"b": "x"})


def test_reading_creates_no_file(tmp_path: Path) -> None:
    references = References(tmp_path / "references.sqlite")
    assert references.of("one") == {}
    assert not list(tmp_path.iterdir())
    references.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError):
        References(tmp_path / "file" / "references.sqlite").add("one", {"a": "x"})


WORK = """
import sys
from kvrag.store.references import References
references = References(sys.argv[1])
for number in range(200):
    references.add(sys.argv[2], {str(number): str(number % 5)})
    if number % 2:
        references.remove(sys.argv[2], [str(number - 1)])
references.close()
"""


def test_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "references.sqlite"
    workers = [subprocess.Popen([sys.executable, "-c", WORK, path, f"owner{i}"]) for i in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    references = References(path)
    assert sum(references.count(str(key)) for key in range(5)) == 300
    assert len(references.of("owner1")) == 100
    references.close()
