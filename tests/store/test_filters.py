"""Stores that compress and encrypt: the same rows, a layer at a time, and nothing readable on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kvrag.errors import CacheMiss, ConfigError, MissingExtra
from kvrag.rotary import Rotation
from kvrag.segments import KV, LayerKV
from kvrag.store import filters, layout, planes
from kvrag.store.codec import CODECS, Part
from kvrag.store.damage import Damaged
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, token_bytes
from kvrag.store.sealing import OVERHEAD, MasterKey
from kvrag.testing.stores import KVStoreContract, assert_same_rows, example_fingerprint, example_rows

MASTER = bytes(range(32))
OTHER = bytes(range(1, 33))
TOKENS = tuple(range(100, 300))
SHAPES = ((2, 16, 12), (1, 16, 8), (2, 16, 12))
ROTATIONS = (Rotation((1.0, 0.1, 0.01, 0.001)), None, Rotation((0.5, 0.25), start=2))
ROWS = example_rows(TOKENS, dtype=torch.bfloat16, shapes=SHAPES)
WAYS = {
    "plain": {},
    "zstd": {"compress": "zstd"},
    "sealed": {"key": MASTER},
    "zstd and sealed": {"compress": "zstd", "key": MASTER},
}


def key_of(codec: str = "raw", tokens: tuple[int, ...] = TOKENS, **changes: object) -> EntryKey:
    return EntryKey(
        example_fingerprint(dtype="bfloat16", codec=codec, rotations=ROTATIONS, **changes), tokens
    )


def coded(codec: str) -> KV:
    """The rows as this codec gives them back."""
    found = CODECS[codec]
    pairs = zip(ROWS.layers, ROTATIONS, strict=True)
    return KV(TOKENS, tuple(found.unpack(found.pack(x, turn), torch.bfloat16, turn) for x, turn in pairs))


def the_data_file(path: Path) -> Path:
    (manifest,) = path.glob("*/*.json")
    (file,) = (f for f in manifest.parent.iterdir() if f != manifest)
    return file


class TestCompressed(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store"

    def make_store(self) -> DiskStore:
        return DiskStore(self.path, compress="zstd")


class TestSealed(TestCompressed):
    def make_store(self) -> DiskStore:
        return DiskStore(self.path, key=MASTER)


class TestCompressedAndSealed(TestCompressed):
    def make_store(self) -> DiskStore:
        return DiskStore(self.path, compress="zstd", key=MASTER)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("by_layer", [False, True], ids=["at once", "by layer"])
@pytest.mark.parametrize("verify", ["load", "never"])
def test_rows_come_back_as_the_codec_gives_them(
    tmp_path: Path, way: str, codec: str, verify: str, *, by_layer: bool
) -> None:
    DiskStore(tmp_path, **WAYS[way]).put(key_of(codec), ROWS)
    store = DiskStore(tmp_path, verify=verify, **WAYS[way])
    assert_same_rows(store.get(key_of(codec), by_layer=by_layer), coded(codec))
    assert_same_rows(store.get(key_of(codec)), coded(codec))
    assert store.check().ok
    assert store.stats().bytes_read <= the_data_file(tmp_path).stat().st_size


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_a_layer_is_undone_when_it_is_touched(tmp_path: Path, way: str) -> None:
    DiskStore(tmp_path, **WAYS[way]).put(key_of(), ROWS)
    store = DiskStore(tmp_path, **WAYS[way])
    found = store.get(key_of(), by_layer=True)
    assert store.stats().bytes_read == found.num_bytes_touched == 0
    middle = found.layers[1]
    assert found.layers[1] is middle  # not undone twice
    assert found.num_bytes_touched == middle.num_bytes < found.num_bytes
    (manifest,) = map(layout.read_manifest, tmp_path.glob("*/*.json"))
    assert store.stats().bytes_read == manifest.sizes[1]
    assert_same_rows(KV(TOKENS, (middle,)), KV(TOKENS, (ROWS.layers[1],)))


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_of_the_file_follow_each_other(tmp_path: Path, way: str) -> None:
    DiskStore(tmp_path, **WAYS[way]).put(key_of(), ROWS)
    (manifest,) = map(layout.read_manifest, tmp_path.glob("*/*.json"))
    spans = [(0, manifest.data_start), *manifest.layer_spans(), (manifest.tokens_start, manifest.file_size)]
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert the_data_file(tmp_path).stat().st_size == manifest.file_size


@pytest.mark.parametrize("way", WAYS)
def test_a_new_time_to_live_leaves_the_rows_readable(tmp_path: Path, way: str) -> None:
    """Only the manifest is written again, and what it binds is bound anew."""
    store = DiskStore(tmp_path, **WAYS[way])
    store.put(key_of(), ROWS)
    before = the_data_file(tmp_path).read_bytes()
    store.put(key_of(), ROWS, cost_seconds=3.5, ttl_seconds=1000.0)
    assert the_data_file(tmp_path).read_bytes() == before
    for other in (store, DiskStore(tmp_path, **WAYS[way])):
        assert_same_rows(other.get(key_of()), ROWS)
        info = other.info(key_of().id)
        assert info is not None
        assert info.cost_seconds == 3.5
        assert info.expires is not None
    assert store.check().ok


@pytest.mark.parametrize("way", WAYS)
def test_another_end_leaves_the_rows_readable(tmp_path: Path, way: str) -> None:
    store = DiskStore(tmp_path, **WAYS[way])
    store.put(key_of(), ROWS)
    for ttl in (1000.0, None):
        assert store.expire(key_of().id, ttl)
        for other in (store, DiskStore(tmp_path, **WAYS[way])):
            assert_same_rows(other.get(key_of()), ROWS)
            info = other.info(key_of().id)
            assert info is not None
            assert (info.expires is None) == (ttl is None)
    assert store.check().ok
    assert store.stats().damaged == 0


def test_without_the_key_no_end_is_changed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, key=MASTER)
    store.put(key_of(), ROWS)
    with pytest.raises(ConfigError, match="open it with its key"):
        DiskStore(tmp_path).expire(key_of().id, 1000.0)
    assert_same_rows(store.get(key_of()), ROWS)


# --- compression --------------------------------------------------------------------------------


@given(
    raw=st.binary(max_size=400),
    dtypes=st.lists(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]), min_size=1),
)
def test_every_byte_comes_back(raw: bytes, dtypes: list[torch.dtype]) -> None:
    parts, tensors = [], []
    for number, dtype in enumerate(dtypes):
        piece = raw[number * 40 :][: 40 // dtype.itemsize * dtype.itemsize]
        piece = piece[: len(piece) // dtype.itemsize * dtype.itemsize]
        parts.append(Part(str(number), dtype, (len(piece) // dtype.itemsize,)))
        tensors.append(memoryview(piece))
    frame = planes.compress(tensors, parts)
    if sum(map(len, tensors)) <= planes.MAX_RATIO * len(frame):
        assert planes.decompress(frame, parts).numpy().tobytes() == b"".join(tensors)


def test_compressed_entries_are_smaller_and_still_safetensors(tmp_path: Path) -> None:
    for way in ("plain", "zstd"):
        DiskStore(tmp_path / way, **WAYS[way]).put(key_of(), ROWS)
    plain, small = (the_data_file(tmp_path / way) for way in ("plain", "zstd"))
    assert small.stat().st_size < 0.85 * plain.stat().st_size
    with safe_open(small, "pt") as file:
        assert list(file.keys()) == ["000.zstd", "001.zstd", "002.zstd", "tokens"]
        assert file.get_tensor("tokens").tolist() == list(TOKENS)
        assert file.get_tensor("000.zstd").dtype == torch.uint8


def test_stores_that_do_and_do_not_compress_share_entries(tmp_path: Path) -> None:
    one, other = DiskStore(tmp_path, compress="zstd"), DiskStore(tmp_path)
    one.put(key_of(), ROWS)
    other.put(key_of("int8"), ROWS)
    assert_same_rows(other.get(key_of()), ROWS)
    assert_same_rows(one.get(key_of("int8")), coded("int8"))
    assert one.check() == other.check()
    assert one.check().ok


@pytest.mark.parametrize("what", ["noise", "nothing"])
def test_what_gains_nothing_or_is_no_cache_stays_as_it_is(tmp_path: Path, what: str) -> None:
    """Noise would be read slower for nothing; zeros are what a bomb is made of."""
    noise = torch.randint(-(2**15), 2**15, (2, 2, len(TOKENS), 64), dtype=torch.int16)
    keys, values = (noise if what == "noise" else noise * 0).view(torch.bfloat16)
    kv = KV(TOKENS, (LayerKV(keys, values),))
    store = DiskStore(tmp_path, compress="zstd")
    store.put(key_of(), kv)
    found = store.get(key_of())
    assert_same_rows(found, kv)
    with safe_open(the_data_file(tmp_path), "pt") as file:
        assert "000.keys" in file.keys()  # noqa: SIM118 - not a dictionary


@pytest.mark.parametrize("key", [None, bytes(32)])
def test_a_layer_that_would_grow_among_layers_that_shrink(tmp_path: Path, key: bytes | None) -> None:
    """What is written can be read: readers expect no layer to be larger than its codec writes it."""
    tokens = tuple(range(40))
    noise = torch.frombuffer(bytearray(os.urandom(40 * 8 * 4)), dtype=torch.float32).view(1, 40, 8).clone()
    flat = torch.arange(4 * 40 * 8, dtype=torch.float32).view(4, 40, 8) / 4096
    rows = KV(tokens, (LayerKV(flat, flat.clone()), LayerKV(noise[..., :1], noise[..., 1:2])))
    text = EntryKey(example_fingerprint(), tokens)
    store = DiskStore(tmp_path / "store", compress="zstd", key=key)
    store.put(text, rows)
    assert store.damage(text.id) is None
    assert_same_rows(store.get(text), rows)


def test_without_the_library_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskStore(tmp_path, compress="zstd").put(key_of(), ROWS)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    store = DiskStore(tmp_path)
    for by_layer in (False, True):
        with pytest.raises(MissingExtra, match=r"kvrag\[compress\]"):
            store.get(key_of(), by_layer=by_layer)
    with pytest.raises(MissingExtra, match=r"kvrag\[compress\]"):
        DiskStore(tmp_path, compress="zstd")
    store.put(key_of("int8"), ROWS)
    assert_same_rows(store.get(key_of("int8")), coded("int8"))
    assert store.check().ok  # checksums are of the bytes as they lie there
    assert store.stats().damaged == 0


def test_the_store_does_without_the_libraries_that_it_is_not_asked_for() -> None:
    code = (
        "import sys; sys.modules['zstandard'] = sys.modules['cryptography'] = None\n"
        "from kvrag.store.disk import DiskStore\n"
        "from kvrag.testing.stores import *\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    store, key = DiskStore(folder), EntryKey(example_fingerprint(), (1, 2))\n"
        "    store.put(key, example_rows((1, 2)))\n"
        "    assert_same_rows(store.get(key), example_rows((1, 2)))\n"
        "    try:\n"
        "        DiskStore(folder, key=bytes(32))\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MissingExtra" in done.stdout
    assert "kvrag[encrypt]" in done.stdout


@pytest.mark.parametrize("compress", ["gzip", "", 3])
def test_unknown_compression_is_refused(tmp_path: Path, compress: object) -> None:
    with pytest.raises(ConfigError, match="expected 'zstd' or None"):
        DiskStore(tmp_path, compress=compress)


# --- encryption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sealed", "zstd and sealed"])
def test_nothing_readable_is_left(tmp_path: Path, way: str) -> None:
    key = key_of("raw", prefix="digest-of-a-prompt", model="digest-of-weights")
    kv = KV(TOKENS, tuple(LayerKV(x.keys * 0 + 1.5, x.values * 0 - 2.5) for x in ROWS.layers))
    DiskStore(tmp_path, **WAYS[way]).put(key, kv)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    rows = [layer.keys.view(torch.uint8).numpy().tobytes() for layer in kv.layers]
    for secret in (
        *(row[:32] for row in rows),
        token_bytes(TOKENS)[:32],
        b"digest-of-a-prompt",
        b"digest-of-weights",
        b"bfloat16",
        MASTER,
        MASTER.hex().encode(),
    ):
        assert secret not in written


def test_equal_rows_are_never_written_alike(tmp_path: Path) -> None:
    """A nonce is never used twice: not for two layers, two entries, or the same entry again."""
    kv = KV(TOKENS, (ROWS.layers[0], ROWS.layers[0]))
    store, seen = DiskStore(tmp_path, key=MASTER), []
    for _ in range(3):
        store.put(key_of(), kv)
        (manifest,) = map(layout.read_manifest, tmp_path.glob("*/*.json"))
        raw = the_data_file(tmp_path).read_bytes()
        seen += [raw[start:end] for start, end in manifest.layer_spans()]
        store.delete(key_of().id)
    assert len({blob[:12] for blob in seen}) == len({blob[12:] for blob in seen}) == 6


@pytest.mark.parametrize("way", ["sealed", "zstd and sealed"])
def test_another_key_is_one_clear_error(tmp_path: Path, way: str) -> None:
    DiskStore(tmp_path, **WAYS[way]).put(key_of(), ROWS)
    with pytest.raises(ConfigError, match=r"is encrypted with the key [0-9a-f]{8}, given was [0-9a-f]{8}"):
        DiskStore(tmp_path, key=OTHER)
    assert_same_rows(DiskStore(tmp_path, key=MASTER).get(key_of()), ROWS)


def test_without_the_key_a_store_can_be_verified_and_emptied_and_no_more(tmp_path: Path) -> None:
    DiskStore(tmp_path, key=MASTER).put(key_of(), ROWS)
    store = DiskStore(tmp_path)
    for call in (lambda: store.get(key_of()), lambda: store.put(key_of("int8"), ROWS)):
        with pytest.raises(ConfigError, match="open it with its key"):
            call()
    with pytest.raises(CacheMiss):
        store.get(key_of("fp8"))
    assert list(store.ids()) == [key_of().id]
    assert store.stats().entries == 1
    assert store.stats().damaged == 0
    assert store.check(fix=True).ok
    raw = bytearray(the_data_file(tmp_path).read_bytes())
    raw[300] ^= 1
    the_data_file(tmp_path).write_bytes(raw)
    assert store.check().damaged == (key_of().id,)
    assert store.delete(key_of().id)
    assert not list(tmp_path.glob("*/*"))


def test_a_store_with_open_entries_takes_no_key(tmp_path: Path) -> None:
    DiskStore(tmp_path).put(key_of(), ROWS)
    with pytest.raises(ConfigError, match="entries that are not encrypted"):
        DiskStore(tmp_path, key=MASTER)
    assert_same_rows(DiskStore(tmp_path).get(key_of()), ROWS)


def test_whoever_comes_first_decides(tmp_path: Path) -> None:
    """Opened before there was anything: the key is compared when something is written."""
    stores = [DiskStore(tmp_path / "a", **kwargs) for kwargs in ({"key": MASTER}, {"key": OTHER}, {})]
    stores[0].put(key_of(), ROWS)
    for late in stores[1:]:
        with pytest.raises(ConfigError, match="encrypted"):
            late.put(key_of("int8"), ROWS)
    assert_same_rows(stores[0].get(key_of()), ROWS)
    open_one, late = DiskStore(tmp_path / "b"), DiskStore(tmp_path / "b", key=MASTER)
    open_one.put(key_of(), ROWS)
    with pytest.raises(ConfigError, match="not encrypted"):
        late.put(key_of("int8"), ROWS)
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize(
    "says", [b"", b"[]", b"{}", b"nonsense", b'{"layout":9,"encryption":"x"}', b"[" * 99999]
)
def test_a_broken_note_of_the_key_is_one_clear_error(tmp_path: Path, says: bytes) -> None:
    DiskStore(tmp_path, key=MASTER).put(key_of(), ROWS)
    (tmp_path / "store.json").write_bytes(says)
    for kwargs in ({}, {"key": MASTER}):
        with pytest.raises(ConfigError, match=r"store\.json"):
            DiskStore(tmp_path, **kwargs)


def test_a_crash_while_the_key_is_noted_is_mended(tmp_path: Path) -> None:
    (tmp_path / "store.json.partial").write_bytes(b'{"lay')
    store = DiskStore(tmp_path, key=MASTER)
    store.put(key_of(), ROWS)
    says = json.loads((tmp_path / "store.json").read_bytes())
    expected = {"layout": 2, "encryption": "aes256gcm", "key_id": MasterKey(MASTER).id, "previous": ""}
    assert says == expected
    assert not (tmp_path / "store.json.partial").exists()
    assert_same_rows(DiskStore(tmp_path, key=MASTER).get(key_of()), ROWS)


@pytest.mark.parametrize("key", [b"", b"x" * 31, b"x" * 33])
def test_keys_of_other_lengths_are_refused(tmp_path: Path, key: bytes) -> None:
    with pytest.raises(ConfigError, match="expected 32"):
        DiskStore(tmp_path, key=key)


@given(
    st.binary(max_size=60), st.integers(0, 200), st.integers(1, 255), st.sampled_from(["layer 0", "tokens"])
)
def test_a_blob_opens_as_it_was_sealed_or_not_at_all(plain: bytes, at: int, flip: int, where: str) -> None:
    cipher = MasterKey(MASTER).cipher("t", "e")
    blob = cipher.seal([plain], where, "x")
    assert len(blob) == len(plain) + OVERHEAD
    assert cipher.open(blob, where, "x").numpy().tobytes() == plain
    changed = bytearray(blob)
    changed[at % len(blob)] ^= flip
    strangers = [
        (MasterKey(MASTER).cipher("t", "f"), blob, (where, "x")),
        (MasterKey(MASTER).cipher("u", "e"), blob, (where, "x")),
        (MasterKey(OTHER).cipher("t", "e"), blob, (where, "x")),
        (cipher, blob, ("layer 1", "x")),
        (cipher, blob, (where, "x", "")),
        (cipher, blob, (where + "x", "")),
        (cipher, changed, (where, "x")),
        (cipher, blob[:-1], (where, "x")),
        (cipher, blob[: at % OVERHEAD], (where, "x")),
    ]
    for other, raw, bound in strangers:
        with pytest.raises(Damaged):
            other.open(raw, *bound)


def test_the_derivation_is_as_specified() -> None:
    """HKDF-SHA256 written out (RFC 5869), so that another implementation finds the same keys."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    def hkdf(key: bytes, info: bytes) -> bytes:
        extracted = hmac.digest(bytes(32), key, hashlib.sha256)
        return hmac.digest(extracted, info + b"\x01", hashlib.sha256)

    master = MasterKey(MASTER)
    assert master.id == hkdf(MASTER, b"kvrag 2 id ").hex()[:32]
    key = hkdf(hkdf(MASTER, b"kvrag 2 tenant label"), b"kvrag 2 entry name")
    bound = b"".join(
        len(x).to_bytes(8, "little") + x for x in (b"kvrag", b"2", b"name", b"layer 7", b"zstd+aes256gcm")
    )
    blob = bytes(master.cipher("label", "name").seal([b"rows"], *filters.place(7, ("zstd", "aes256gcm"))))
    assert AESGCM(key).decrypt(blob[:12], blob[12:], bound) == b"rows"


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, key=MASTER)
    shown = repr(store) + repr(vars(store)) + repr(MasterKey(MASTER))
    assert MASTER.hex() not in shown
    assert repr(MASTER) not in shown
    assert os.listdir(tmp_path) == []  # and nothing is written by opening
