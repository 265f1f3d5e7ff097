import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings
from chromadb.utils.embedding_functions import known_embedding_functions, register_embedding_function

from kvrag.embedding import HashedEmbedding
from kvrag.errors import ConfigError, CorpusError, CorpusLocked, DuplicateDocument, InputError
from kvrag.index import Index


class OtherEmbedding(EmbeddingFunction[Documents]):
    def __init__(self, size: int = 3) -> None:
        self.size = size

    def __call__(self, input: Documents) -> Embeddings:
        return [np.full(self.size, len(text) + 1, dtype=np.float32) for text in input]

    @staticmethod
    def name() -> str:
        return "kvrag_test_other"

    def get_config(self) -> dict[str, Any]:
        return {"size": self.size}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "OtherEmbedding":
        return OtherEmbedding(**config)


@pytest.fixture
def index(tmp_path: Path):
    index = Index.open(tmp_path / "chroma")
    yield index
    index.close()


def add(index: Index, *ids: str) -> None:
    index.add(ids, [f"text of {i}" for i in ids], [{}] * len(ids))


def test_records_come_back_as_they_were(index: Index) -> None:
    texts = ["CRLF\r\n", "NUL\0", "  blanks \n", "e\u0301 😀 \ufeff"]
    index.add(list("abcd"), texts, [{}, {"n": 1}, {"x": 0.5, "b": True}, {"s": "t"}])
    found = index.get(list("dcbax"))
    assert [r.text for r in found] == texts[::-1]
    assert found[1].metadata == {"x": 0.5, "b": True}
    assert found[3].metadata == {}
    assert index.count() == 4
    assert {r.id for r in index.records()} == set("abcd")
    assert index.existing(["a", "y"]) == {"a"}


def test_add_refuses_what_chroma_would_ignore(index: Index) -> None:
    add(index, "a")
    with pytest.raises(DuplicateDocument, match="'a'"):
        add(index, "b", "a")
    assert index.count() == 1


def test_upsert_replaces_metadata_and_update_merges_it(index: Index) -> None:
    index.upsert(["a"], ["one"], [{"x": 1, "y": 2}])
    index.upsert(["a", "b"], ["two", "three"], [{"y": 3}, {}])
    assert [(r.text, r.metadata) for r in index.get(["a", "b"])] == [("two", {"y": 3}), ("three", {})]
    index.update_metadata(["a"], [{"z": 4, "y": None}])
    assert index.get(["a"])[0].metadata == {"z": 4}


def test_delete_passes_over_what_is_not_there(index: Index) -> None:
    add(index, "a", "b")
    index.delete(["a", "nothing"])
    index.delete([])
    assert [r.id for r in index.records()] == ["b"]


def test_search(index: Index) -> None:
    assert index.search("anything", 3) == []
    index.add(list("abc"), ["the red boat", "the old mill", "a red mill"], [{"n": 1}, {"n": 2}, {"n": 2}])
    hits = index.search("red boat", 10)
    assert hits[0].id == "a"
    assert len(hits) == 3
    assert hits[0].distance < hits[1].distance
    for hit in hits:
        one, other = HashedEmbedding()(["red boat", hit.text])
        assert hit.similarity == pytest.approx(float(one @ other), abs=1e-5)
    assert [h.id for h in index.search("red boat", 1, where={"n": 2})] == ["c"]
    with pytest.raises(InputError, match="k=0"):
        index.search("x", 0)


def test_more_records_than_a_call_takes(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_batch", 7)
    monkeypatch.setattr("kvrag.index._PAGE", 5)
    ids = [f"id{i}" for i in range(50)]
    add(index, *ids)
    assert [r.id for r in index.get(ids)] == ids
    assert {r.id for r in index.records()} == set(ids)
    index.upsert(ids, ids, [{"a": 1}] * 50)
    index.update_metadata(ids, [{"b": 1}] * 50)
    assert index.get(ids)[49].metadata == {"a": 1, "b": 1}
    index.delete(ids[:49])
    assert index.count() == 1


@pytest.mark.parametrize(
    ("ids", "texts", "metadatas"),
    [
        (["a"], ["lone \ud800"], [{}]),
        (["\ud800"], ["x"], [{}]),
        ([""], ["x"], [{}]),
        (["a"], ["x"], [{"n": {"nested": 1}}]),
        (["a"], ["x"], [{"b": b"bytes"}]),
        (["a"], ["x"], [{5: "key"}]),
    ],
)
def test_what_chroma_cannot_keep(
    index: Index, ids: list[str], texts: list[str], metadatas: list[Any]
) -> None:
    with pytest.raises(InputError):
        index.check_records(ids, texts, metadatas)


# --- embeddings ---------------------------------------------------------------------------------


def test_a_reopened_collection_brings_its_embedding(tmp_path: Path) -> None:
    with_size = Index.open(tmp_path, embedding=HashedEmbedding(64))
    add(with_size, "a")
    with_size.close()
    again = Index.open(tmp_path)
    add(again, "b")
    assert len(again.search("text of b", 2)) == 2
    again.close()


def test_another_embedding_is_refused(tmp_path: Path) -> None:
    Index.open(tmp_path).close()
    with pytest.raises(ConfigError, match=r"'kvrag_hashed', not 'kvrag_test_other'"):
        Index.open(tmp_path, embedding=OtherEmbedding())
    with pytest.raises(ConfigError, match="1024"):
        Index.open(tmp_path, embedding=HashedEmbedding(64))
    Index.open(tmp_path, embedding=HashedEmbedding()).close()


def test_an_embedding_that_is_not_registered_is_named(tmp_path: Path) -> None:
    register_embedding_function(OtherEmbedding)
    try:
        index = Index.open(tmp_path, embedding=OtherEmbedding())
        add(index, "a")
        index.close()
    finally:
        del known_embedding_functions[OtherEmbedding.name()]
    with pytest.raises(ConfigError, match=r"kvrag_test_other.*import the module"):
        Index.open(tmp_path)
    index = Index.open(tmp_path, embedding=OtherEmbedding())
    assert index.search("x", 1)[0].id == "a"
    index.close()


def test_a_bad_collection_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a b"):
        Index.open(tmp_path, "a b")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError):
        Index.open(tmp_path / "file" / "chroma")


# --- several processes --------------------------------------------------------------------------

WRITE = """
import sys
from kvrag.index import Index
index = Index.open(sys.argv[1])
first, count = int(sys.argv[2]), int(sys.argv[3])
numbers = range(first, first + count)
ids = [f"child{i}" for i in numbers]
index.add(ids, [f"{i} harbour{i * 7919 % 1009} mill{i * 31 % 977}" for i in numbers], [{}] * count)
print("written", flush=True)
sys.stdin.readline()
"""


def start_writer(folder: Path, first: int, count: int) -> subprocess.Popen[bytes]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, folder, str(first), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    return writer


def test_one_writing_process_at_a_time(tmp_path: Path) -> None:
    index = Index.open(tmp_path)
    writer = start_writer(tmp_path, 0, 3)
    try:
        assert index.count() == 3  # reading needs no lock
        with pytest.raises(CorpusLocked, match=f"pid {writer.pid}.*chroma run"):
            add(index, "mine")
    finally:
        writer.kill()  # also a crash gives the lock back
        writer.communicate()
    add(index, "mine")
    assert index.count() == 4
    index.close()


def test_writers_one_after_the_other_lose_no_vector(tmp_path: Path) -> None:
    """Chroma alone loses the child's vectors: its memory is saved over their file."""
    index, other = Index.open(tmp_path), Index.open(tmp_path, "second")
    add(index, *(f"early{i}" for i in range(40)))
    index.close()
    index = Index.open(tmp_path)
    assert index.search("text of early7", 1)[0].id == "early7"
    start_writer(tmp_path, 0, 1300).communicate(b"\n")
    assert index.search("77 harbour313 mill433", 1)[0].id.startswith("child")
    start_writer(tmp_path, 1300, 20).communicate(b"\n")
    add(index, *(f"late{i}" for i in range(1100)))
    index.close()
    other.close()
    index = Index.open(tmp_path)
    assert index.count() == 40 + 1320 + 1100
    queries = {n: f"{n} harbour{n * 7919 % 1009} mill{n * 31 % 977}" for n in range(0, 1320, 40)}
    found = [index.search(text, 1)[0].id == f"child{n}" for n, text in queries.items()]
    assert sum(found) > 0.8 * len(found)  # the graph is approximate; lost vectors were more than half
    assert index.search("text of late1010", 1)[0].id.startswith("late")
    index.close()


def test_a_foreign_client_that_keeps_the_folder_stale_is_noticed(tmp_path: Path) -> None:
    index = Index.open(tmp_path)
    foreign = chromadb.PersistentClient(os.path.realpath(tmp_path))
    start_writer(tmp_path, 0, 3).communicate(b"\n")
    assert index.count() == 3
    with pytest.raises(CorpusError, match="close them"):
        add(index, "mine")
    foreign.close()
    add(index, "mine")
    assert index.count() == 4
    index.close()


def test_two_collections_of_one_process_share_the_lock(tmp_path: Path) -> None:
    one, two = Index.open(tmp_path, "one"), Index.open(tmp_path, "two")
    add(one, "a")
    add(two, "a")
    assert one.id != two.id
    one.close()
    add(two, "b")
    two.close()
    start_writer(tmp_path, 0, 1).communicate(b"\n")


# --- a server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", str(folder)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/api/v2/heartbeat", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.2)
        else:
            pytest.fail("the server does not answer")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_same_over_http(server: str) -> None:
    index = Index.open(server, "over_http")
    test_records_come_back_as_they_were(index)
    index.delete(list("abcd"))
    test_add_refuses_what_chroma_would_ignore(index)
    index.delete(["a"])
    test_upsert_replaces_metadata_and_update_merges_it(index)
    index.delete(["a", "b"])
    test_search(index)
    index.close()
    with pytest.raises(ConfigError):
        Index.open(server, "over_http", embedding=HashedEmbedding(64))


def test_no_server_there() -> None:
    with pytest.raises(CorpusError, match="cannot reach"):
        Index.open("http://127.0.0.1:9")
