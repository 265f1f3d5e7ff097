"""The contract of stores against a real S3 protocol: moto's server on loopback, spoken to by s3fs.

Not among the collected tests: s3fs and moto hold python-dateutil below 3, which constraints.txt does not. In
an environment of its own:

    pip install s3fs 'moto[s3]' flask flask-cors
    python -m pytest tests/store/s3_on_loopback.py
"""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from kvrag.errors import CacheMiss, StoreWriteError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

# What the libraries of S3 warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def bucket(address: str) -> ObjectStore:
    name = f"b{uuid.uuid4().hex}"
    options = {"key": "none", "secret": "none", "endpoint_url": address}
    s3fs.S3FileSystem(**options).mkdir(name)
    return ObjectStore(f"s3://{name}/prefix", **options)


class TestS3(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, address: str) -> None:
        self.address = address

    def make_store(self) -> KVStore:
        return bucket(self.address)


class TestDiskBeforeS3(TestS3):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"

    def make_store(self) -> KVStore:
        return TieredStore([DiskStore(self.folder), bucket(self.address)], write="back")


def test_large_entries_by_layer_and_damage(address: str) -> None:
    store = bucket(address)
    tokens = tuple(range(3000))
    key, rows = EntryKey(example_fingerprint(), tokens), example_rows(tokens, shapes=((8, 64, 64),) * 6)
    store.put(key, rows)
    found = store.get(key, by_layer=True)
    assert found.num_bytes_touched == 0
    assert_same_rows(store.get(key), rows)
    found.layers[2]
    receipt = store.delete(key.id)
    assert receipt.erased[0].startswith("objects: s3://")
    assert_same_rows(found, rows)
    store.put(key, rows)
    fs = s3fs.S3FileSystem(key="none", secret="none", endpoint_url=address)
    path = f"{store.url}/{key.id[:2]}/{key.id}.kvrag"
    fs.pipe_file(path, fs.cat_file(path)[:-5])
    with pytest.raises(CacheMiss):
        store.get(key)


def test_nobody_answers() -> None:
    # A port that is closed; no time is spent on trying again.
    options = {"key": "none", "secret": "none", "endpoint_url": "http://127.0.0.1:9"}
    config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    store = ObjectStore("s3://b/prefix", **options, config_kwargs=config)
    key = EntryKey(example_fingerprint(), (1, 2))
    with pytest.raises(CacheMiss):
        store.get(key)
    with pytest.raises(StoreWriteError):
        store.put(key, example_rows((1, 2)))
    with pytest.raises(StoreWriteError):
        store.delete(key.id)
    assert store.read_failures == 1
