"""The object tier against a real S3 protocol: moto's server on loopback, spoken to by s3fs.

Not among the collected tests: botocore, which s3fs and moto stand on, wants a python-dateutil below 3, and
kubernetes, which chromadb brings, one from 3 on, so no environment has these and the versions of
constraints.txt. `make test-s3` puts the libraries into a folder of their own, in front of the others.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import CacheMiss, ConfigError, EntryTooLarge, MissingExtra, StoreError, StoreWriteError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.objects import ObjectStore
from kvrag.store.tiers import TieredStore
from kvrag.testing.models import tiny
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

# What the libraries of S3 warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

NONE = {"key": "none", "secret": "none"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def new_bucket(address: str) -> str:
    name = f"b{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**NONE, endpoint_url=address).mkdir(name)
    return f"s3://{name}/prefix"


def store_at(address: str, url: str, **options: Any) -> ObjectStore:
    return ObjectStore(url, **{**NONE, "endpoint_url": address, **options})


def bucket(address: str) -> ObjectStore:
    return store_at(address, new_bucket(address))


def key_of(number: int) -> EntryKey:
    return EntryKey(example_fingerprint(), (7, number))


def put(store: KVStore, *numbers: int) -> None:
    for number in numbers:
        store.put(key_of(number), example_rows((7, number)))


def there(store: KVStore, most: int = 12) -> list[int]:
    found = []
    for number in range(most):
        try:
            assert_same_rows(store.get(key_of(number)), example_rows((7, number)))
        except CacheMiss:
            continue
        found.append(number)
    return found


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


# ---- two machines and a bucket


def test_what_one_machine_writes_back_another_reads_through(address: str, tmp_path: Path) -> None:
    url = new_bucket(address)
    first = TieredStore([DiskStore(tmp_path / "first"), store_at(address, url)], write="back")
    put(first, 0, 1, 2)
    assert first.flush(60) == 0
    first.close()
    disk = DiskStore(tmp_path / "second")
    second = TieredStore([disk, store_at(address, url)], write="back")
    assert there(second) == [0, 1, 2]
    assert [stats.hits for stats in second.tier_stats()] == [0, 3]
    assert there(disk) == [0, 1, 2]
    assert there(second) == [0, 1, 2]
    assert [stats.hits for stats in second.tier_stats()] == [3, 3]
    for number in range(3):  # as the same bytes, which were never decoded
        mine, theirs = (
            disk.files_of(key_of(number).id),
            DiskStore(tmp_path / "first").files_of(key_of(number).id),
        )
        assert [f.read_bytes() for f in mine] == [f.read_bytes() for f in theirs]
    second.close()


def test_an_answer_on_another_machine_comes_from_the_bucket(address: str, tmp_path: Path) -> None:
    texts, url = (
        ["The lighthouse of Varn was built in 1871.", "A ferry crosses the Mirrow."],
        new_bucket(address),
    )
    prompt, sampling, answers = f"Read. {texts[0]} {texts[1]} When?", Sampling(max_new_tokens=4), []
    for machine, is_hit in (("first", False), ("second", True)):
        with Engine(tiny(), tmp_path / machine, objects=store_at(address, url), recompute="never") as engine:
            answers.append(engine.answer(prompt, texts, prefix="Read. ", sampling=sampling))
            assert [document.is_hit for document in answers[-1].documents] == [is_hit] * 2
            assert isinstance(engine.store, TieredStore)
            assert engine.store.flush(60) == 0
    assert answers[0].text == answers[1].text


def test_damage_in_the_bucket_is_a_miss_and_is_set_aside(address: str, tmp_path: Path) -> None:
    store = bucket(address)
    put(store, 0, 1)
    fs = s3fs.S3FileSystem(**NONE, endpoint_url=address)
    path = f"{store.url}/{key_of(0).id[:2]}/{key_of(0).id}.kvrag"
    raw = bytearray(fs.cat_file(path))
    raw[-40] ^= 1
    fs.pipe_file(path, bytes(raw))
    tiers = TieredStore([DiskStore(tmp_path / "disk"), store], write="back")
    assert there(tiers) == [1]
    assert store.stats().damaged == 1
    assert [name.split("/")[-2] for name in fs.find(f"{store.url}/quarantine")] == ["quarantine"]
    assert there(DiskStore(tmp_path / "disk")) == [1]
    put(tiers, 0)  # and written anew
    assert tiers.flush(60) == 0
    assert there(store) == [0, 1]
    assert store.check().ok
    tiers.close()


def test_deleting_erases_everywhere_and_says_where(address: str, tmp_path: Path) -> None:
    store = bucket(address)
    tiers = TieredStore([DiskStore(tmp_path / "disk"), store], write="back")
    put(tiers, 0, 1)
    tiers.flush(60)
    receipt = tiers.delete(key_of(0).id)
    assert [place for place in receipt.erased if place.startswith("objects: ")] == [
        f"objects: {store.url}/{key_of(0).id[:2]}/{key_of(0).id}.kvrag"
    ]
    assert sum(place.startswith("disk: ") for place in receipt.erased) >= 2
    fs = s3fs.S3FileSystem(**NONE, endpoint_url=address)
    assert not [name for name in fs.find(store.url) if key_of(0).id in name]
    assert there(tiers) == [1]
    tiers.close()


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
    fs = s3fs.S3FileSystem(**NONE, endpoint_url=address)
    path = f"{store.url}/{key.id[:2]}/{key.id}.kvrag"
    fs.pipe_file(path, fs.cat_file(path)[:-5])
    with pytest.raises(CacheMiss):
        store.get(key)


def test_a_bucket_keeps_its_budget(address: str, tmp_path: Path) -> None:
    url = new_bucket(address)
    plain = store_at(address, url)
    put(plain, 0)
    size = plain.stats().num_bytes
    store = store_at(address, url, budget_bytes=int(3.5 * size))
    tiers = TieredStore([DiskStore(tmp_path / "disk"), store], write="back")
    for number in range(1, 7):  # one after the other: ages are seconds here
        put(tiers, number)
        assert tiers.flush(60) == 0
    assert plain.stats().num_bytes <= 3.5 * size
    assert len(there(plain)) == 3
    assert (store.stats().evictions, store.stats().evicted_bytes) == (4, 4 * size)
    assert there(tiers) == [1, 2, 3, 4, 5, 6]  # the disk has them
    long = tuple(range(500))
    with pytest.raises(EntryTooLarge, match="larger than the bucket's budget"):
        store.put(EntryKey(example_fingerprint(), long), example_rows(long))
    tiers.put(EntryKey(example_fingerprint(), long), example_rows(long))
    assert tiers.flush(60) == 0  # given up, with a warning, and not tried for ever
    assert DiskStore(tmp_path / "disk").held() == []
    tiers.close()


# ---- naming a bucket


@pytest.fixture
def environment(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials but those of the variables."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setattr(ObjectStore.probe, "__defaults__", (60.0,))  # the machine may be busy
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("environment")
def test_a_url_is_enough_where_the_environment_says_the_rest(address: str, tmp_path: Path) -> None:
    with Engine(tiny(), tmp_path / "caches", objects=new_bucket(address)) as engine:
        assert isinstance(engine.store, TieredStore)
        put(engine.store, 0)
        assert engine.store.flush(60) == 0


@pytest.mark.usefixtures("environment")
def test_a_bucket_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="s3://nowhere-at-all/caches cannot be used: "):
        Engine(tiny(), tmp_path / "caches", objects="s3://nowhere-at-all/caches")


@pytest.fixture
def strict(address: str) -> Iterator[None]:
    """A server that looks at credentials."""

    def after_requests(count: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urlopen(Request(f"{address}/moto-api/reset-auth", data=count, headers=headers)).read()

    after_requests(b"0")
    yield
    after_requests(b"inf")


@pytest.mark.usefixtures("environment")
def test_wrong_credentials_are_one_clear_error(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    url = new_bucket(address)
    request.getfixturevalue("strict")
    with pytest.raises(ConfigError, match=r"cannot be used: access was denied \(.*\); check the credentials"):
        Engine(tiny(), tmp_path / "caches", objects=url)
    store = store_at(address, url)
    with pytest.raises(StoreWriteError, match=r"access was denied .*nothing was uploaded"):
        put(store, 0)
    with caplog.at_level(logging.WARNING), pytest.raises(StoreError):
        list(store.ids())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert there(store) == []
    assert caplog.text.count("access was denied") == 1  # one warning for twelve documents


def test_no_credentials_are_one_clear_error(
    address: str, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_bucket(address)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match=r"cannot be used: there are no credentials"):
        ObjectStore(url).probe(30)


def test_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    # A port that is closed; no time is spent on trying again.
    options = {**NONE, "endpoint_url": "http://127.0.0.1:9"}
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
    assert not store.probe(30)
    assert "cannot be reached now" in caplog.text


def test_without_its_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingExtra, match=r"s3fs is not installed; run: pip install 'kvrag\[s3\]'"):
        ObjectStore("s3://bucket/prefix")
