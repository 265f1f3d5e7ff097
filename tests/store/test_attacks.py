"""What somebody who can write to the folder can do: with a key, cause a miss and no more.

Without encryption checksums find accidents only; forgeries of sizes and names are refused there as well, so
that no file makes a reader take endless memory or read outside of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag.errors import CacheMiss, ConfigError
from kvrag.segments import KV
from kvrag.store import layout
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

MASTER = bytes(range(32))
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zstd": {"compress": "zstd"},
    "sealed": {"key": MASTER},
    "both": {"compress": "zstd", "key": MASTER},
}
SEALED = ["sealed", "both"]
SHAPES = ((2, 16, 16), (2, 16, 16), (1, 16, 8))
TOKENS = tuple(range(50, 150))


def key_of(tokens: tuple[int, ...] = TOKENS, **changes: Any) -> EntryKey:
    return EntryKey(example_fingerprint(dtype="bfloat16", **changes), tokens)


def rows_of(tokens: tuple[int, ...] = TOKENS) -> KV:
    return example_rows(tokens, dtype=torch.bfloat16, shapes=SHAPES)


def files_of(path: Path, key: EntryKey) -> tuple[Path, Path]:
    """Manifest and data file."""
    manifest = path / key.id[:2] / f"{key.id}.json"
    (data,) = (file for file in manifest.parent.glob(f"{key.id}.*") if file != manifest)
    return manifest, data


def forge(manifest_file: Path, **changes: Any) -> None:
    """Change a manifest, and make all checksums right again."""
    fields = json.loads(manifest_file.read_bytes())
    fields.pop("manifest_checksum")
    body = json.dumps({**fields, **changes}, separators=(",", ":")).encode()[:-1]
    seal = f',"manifest_checksum":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()
    manifest_file.write_bytes(body + seal)


def sums_of(path: Path, key: EntryKey, fields: dict[str, Any]) -> dict[str, Any]:
    """The checksums of a data file as it is now."""
    raw, at, layers = files_of(path, key)[1].read_bytes(), fields["data_start"], []
    for size in fields["sizes"]:
        layers.append(xxhash.xxh3_128_hexdigest(raw[at : at + size]))
        at += size
    header = xxhash.xxh3_128_hexdigest(raw[: fields["data_start"]])
    return {"header": header, "tokens": xxhash.xxh3_128_hexdigest(raw[at:]), "layers": layers}


def replace_blobs(path: Path, key: EntryKey, blobs: dict[int, bytes]) -> None:
    """Put other bytes in the place of layers (and of tokens: -1), and make sizes and checksums right."""
    manifest, data = files_of(path, key)
    fields, raw = json.loads(manifest.read_bytes()), data.read_bytes()
    at, pieces = fields["data_start"], [raw[: fields["data_start"]]]
    for number, size in enumerate(fields["sizes"]):
        pieces.append(blobs.get(number, raw[at : at + size]))
        at += size
    pieces.append(blobs.get(-1, raw[at:]))
    data.write_bytes(b"".join(pieces))
    fields |= {"sizes": [len(piece) for piece in pieces[1:-1]], "file_size": sum(map(len, pieces))}
    forge(manifest, **fields | {"checksums": sums_of(path, key, fields)})


def blobs_of(path: Path, key: EntryKey) -> list[bytes]:
    """What lies in the place of every layer, and of the tokens."""
    manifest, data = files_of(path, key)
    found, raw = layout.read_manifest(manifest), data.read_bytes()
    return [raw[a:b] for a, b in found.layer_spans()] + [raw[found.tokens_start :]]


def assert_a_miss(path: Path, entry: EntryKey, *, damaged: int = 1, **ways: Any) -> None:
    """Neither at once nor layer by layer, with checksums or without: never rows."""
    for verify in ("load", "never"):
        for by_layer in (True, False):
            copy = path.with_name(f"copy-{verify}-{by_layer}")
            shutil.copytree(path, copy)
            store = DiskStore(copy, verify=verify, **ways)
            with pytest.raises(CacheMiss):
                _ = tuple(store.get(entry, by_layer=by_layer).layers)
            assert store.stats().damaged == damaged
            with pytest.raises(CacheMiss):
                store.get(entry)
            assert bool([*copy.glob("quarantine/*")]) == bool(damaged)
            shutil.rmtree(copy)


# --- any byte -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@given(
    which=st.integers(0, 2),
    at=st.integers(0, 1 << 20),
    how=st.sampled_from(["flip", "cut", "insert", "repeat"]),
    flip=st.integers(1, 255),
    count=st.integers(1, 5000),
    more=st.binary(min_size=1, max_size=9),
    verify=st.sampled_from(["load", "never"]),
    by_layer=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_bytes_are_a_miss_or_the_right_rows(
    tmp_path_factory: pytest.TempPathFactory,
    way: str,
    which: int,
    at: int,
    how: str,
    flip: int,
    count: int,
    more: bytes,
    verify: str,
    *,
    by_layer: bool,
) -> None:
    """Flipped, cut, doubled or inserted, in any file; without checksums, too, where there is a cipher."""
    path = tmp_path_factory.mktemp("store")
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "store.lock")
    file = files[which % len(files)]
    raw = bytearray(file.read_bytes())
    at %= len(raw)
    match how:
        case "flip":
            raw[at] ^= flip
        case "cut":
            del raw[at : at + count]
        case "insert":
            raw[at:at] = more
        case _:
            raw[at : at + 64] = raw[at // 2 : at // 2 + 64]
    file.write_bytes(raw)
    with suppress(CacheMiss, ConfigError if file.name == "store.json" else CacheMiss):
        store = DiskStore(path, verify=verify if way in SEALED else "load", **WAYS[way])
        found = store.get(key_of(), by_layer=by_layer)
        assert_same_rows(KV(TOKENS, tuple(found.layers)), rows_of())
    shutil.rmtree(path)


@pytest.mark.parametrize("way", WAYS)
def test_every_byte_counts(tmp_path: Path, way: str) -> None:
    """No byte of manifest or data file can change unnoticed, one after the other."""
    tokens = (1, 2)
    kv = example_rows(tokens, dtype=torch.bfloat16, shapes=((1, 4, 2),))
    DiskStore(tmp_path, **WAYS[way]).put(key_of(tokens), kv)
    store = DiskStore(tmp_path, keep_bytes=0, **WAYS[way])
    for file in files_of(tmp_path, key_of(tokens)):
        raw = file.read_bytes()
        for at in range(len(raw)):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            assert store.check().damaged == (key_of(tokens).id,), (file.suffix, at)
        file.write_bytes(raw)
    assert_same_rows(store.get(key_of(tokens)), kv)


# --- exchanged blobs and files ------------------------------------------------------------------


@pytest.mark.parametrize("way", SEALED)
def test_layers_cannot_change_places(tmp_path: Path, way: str) -> None:
    path = tmp_path / "store"
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    blobs = blobs_of(path, key_of())
    replace_blobs(path, key_of(), {0: blobs[1], 1: blobs[0]})
    assert_a_miss(path, key_of(), **WAYS[way])


@pytest.mark.parametrize("way", SEALED)
@pytest.mark.parametrize("place", [0, 2, -1], ids=["first", "last", "tokens"])
@pytest.mark.parametrize("whose", ["entry", "tenant"])
def test_blobs_of_others_do_not_fit(tmp_path: Path, way: str, place: int, whose: str) -> None:
    """Not of another text, nor of the same text of another tenant."""
    path = tmp_path / "store"
    other = key_of(TOKENS[::-1]) if whose == "entry" else key_of(tenant="other")
    store = DiskStore(path, **WAYS[way])
    store.put(key_of(), rows_of())
    store.put(other, rows_of(other.tokens))
    foreign = blobs_of(path, other)[place]
    replace_blobs(path, key_of(), {place: foreign})
    assert_a_miss(path, key_of(), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("whose", ["entry", "tenant", "model"])
@pytest.mark.parametrize("renamed", [False, True], ids=["as it is", "with the id changed"])
def test_entries_of_others_do_not_fit(tmp_path: Path, way: str, whose: str, *, renamed: bool) -> None:
    """Both files of another entry under this name; all checksums are right."""
    path = tmp_path / "store"
    mine = key_of()
    other = {
        "entry": key_of(TOKENS[::-1]),
        "tenant": key_of(tenant="other"),
        "model": key_of(model="other"),
    }[whose]
    store = DiskStore(path, **WAYS[way])
    store.put(mine, rows_of())
    store.put(other, rows_of(other.tokens))
    for source, target in zip(files_of(path, other), files_of(path, mine), strict=True):
        shutil.copy(source, target)
    if renamed:
        forge(files_of(path, mine)[0], id=mine.id)
    assert_a_miss(path, mine, **WAYS[way])


@pytest.mark.parametrize("way", SEALED)
def test_an_old_version_of_an_entry_is_still_that_entry(tmp_path: Path, way: str) -> None:
    """Replaying is possible, and harmless: equal names have equal rows."""
    path, old = tmp_path / "store", tmp_path / "old"
    store = DiskStore(path, **WAYS[way])
    store.put(key_of(), rows_of())
    shutil.copytree(path, old)
    store.delete(key_of().id)
    store.put(key_of(), rows_of())
    for source, target in zip(files_of(old, key_of()), files_of(path, key_of()), strict=True):
        shutil.copy(source, target)
    assert_same_rows(DiskStore(path, **WAYS[way]).get(key_of()), rows_of())


# --- claims of manifests and headers ------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change",
    [
        {"file_size": 1 << 39},
        {"file_size": 1 << 80},
        {"num_tokens": 1 << 39},
        {"num_tokens": 0},
        {"sizes": [0, 0, 0]},
        {"sizes": [1 << 39] * 3},
        {"sizes": [-1, 1 << 20, 1]},
        {"sizes": []},
        {"sizes": [1.0, 2.0, 3.0]},
        {"sizes": "no"},
        {"layers": [[1 << 39, 1 << 39, 1 << 39]] * 3},
        {"layers": [[0, 16, 16], [2, 16, 16], [1, 16, 8]]},
        {"layers": [[2, 16, 16]] * 4},
        {"layers": [[4, 8, 8], [2, 16, 16], [1, 16, 8]]},
        {"data_start": 0},
        {"data_start": 128},
        {"id": "0" * 64},
        {"id": 5},
        {"filters": None},
        {"filters": ["aes256gcm", "zstd"]},
        {"filters": ["rot13"]},
        {"fingerprint": {}},
        {"fingerprint": {"tenant": "x", "layout": 2}},
        {"checksums": {"header": "", "tokens": "", "layers": []}},
        {"layers": [[[[[]]]]]},
    ],
    ids=str,
)
def test_claims_that_are_not_true(tmp_path: Path, way: str, change: dict[str, Any]) -> None:
    path = tmp_path / "store"
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    forge(files_of(path, key_of())[0], **change)
    if change.get("layers") == [[4, 8, 8], [2, 16, 16], [1, 16, 8]] and way not in SEALED:
        return  # as many bytes: without a key nothing tells the one shape from the other
    assert_a_miss(path, key_of(), **WAYS[way])


@pytest.mark.parametrize("way", SEALED)
@pytest.mark.parametrize(
    "change",
    [
        {"created": 5.0},
        {"num_tokens": 99},
        {"fingerprint": {"tenant": "x", "layout": 2}},
        {"private": ""},
        {"private": "AAAA"},
        {"private": "!"},
        {"private": "A" * 40},
        {"key_id": ""},
        {"key_id": "ä"},
        {"key_id": "0" * 32},
    ],
    ids=str,
)
def test_every_field_of_a_sealed_manifest_is_proven(tmp_path: Path, way: str, change: dict[str, Any]) -> None:
    path = tmp_path / "store"
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    forge(files_of(path, key_of())[0], **change)
    assert_a_miss(path, key_of(), **WAYS[way])


@pytest.mark.parametrize("way", SEALED)
@pytest.mark.parametrize("whose", ["its own rows", "other rows"])
def test_an_encrypted_store_reads_nothing_that_is_not(tmp_path: Path, way: str, whose: str) -> None:
    """A manifest that says "not encrypted", with a data file to match, made by somebody without the key."""
    path, forged = tmp_path / "store", tmp_path / "forged"
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    rows = rows_of() if whose == "its own rows" else KV(TOKENS, rows_of(TOKENS[::-1]).layers)
    DiskStore(forged).put(key_of(), rows)
    for source, target in zip(files_of(forged, key_of()), files_of(path, key_of()), strict=True):
        shutil.copy(source, target)
    assert_a_miss(path, key_of(), **WAYS[way])


def test_taking_away_the_note_of_the_key_is_an_error_not_a_plain_store(tmp_path: Path) -> None:
    DiskStore(tmp_path, key=MASTER).put(key_of(), rows_of())
    note = (tmp_path / "store.json").read_bytes()
    (tmp_path / "store.json").unlink()
    with pytest.raises(ConfigError, match=r"lost its store\.json"):
        DiskStore(tmp_path, key=MASTER)
    store = DiskStore(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match="open it with its key"):
            store.get(key_of())
    (tmp_path / "store.json").write_bytes(note)
    assert_same_rows(DiskStore(tmp_path, key=MASTER).get(key_of()), rows_of())  # nothing was lost


def test_a_manifest_without_end(tmp_path: Path) -> None:
    path = tmp_path / "store"
    DiskStore(path).put(key_of(), rows_of())
    manifest, _ = files_of(path, key_of())
    forge(manifest, fill="x" * (17 << 20))
    assert_a_miss(path, key_of())
    nested = b'{"id":' + b"[" * 100_000 + b"]" * 100_000
    manifest.write_bytes(nested + f',"manifest_checksum":"{xxhash.xxh3_128_hexdigest(nested)}"}}\n'.encode())
    assert_a_miss(path, key_of())


# --- ciphertexts and frames ---------------------------------------------------------------------


@pytest.mark.parametrize("way", SEALED)
@pytest.mark.parametrize("place", [0, -1], ids=["layer", "tokens"])
@pytest.mark.parametrize("left", [0, 11, 12, 27, 28, -1])
def test_cut_ciphertexts(tmp_path: Path, way: str, place: int, left: int) -> None:
    path = tmp_path / "store"
    DiskStore(path, **WAYS[way]).put(key_of(), rows_of())
    replace_blobs(path, key_of(), {place: blobs_of(path, key_of())[place][:left]})
    assert_a_miss(path, key_of(), **WAYS[way])


def frame_of(size: int, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(bytes(size))


LAYER = 2 * 32 * len(TOKENS) * 2
FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "cut": lambda frame: frame[:-5],
    "too much": lambda _: frame_of(LAYER + 1),
    "too little": lambda _: frame_of(LAYER - 1),
    "a terabyte": lambda _: b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(300),
    "a bomb": lambda _: frame_of(1 << 26),
    "of no size": lambda _: frame_of(LAYER, write_content_size=False),
    "a false size": lambda _: b"\x28\xb5\x2f\xfd\xa0" + LAYER.to_bytes(4, "little") + frame_of(1 << 24)[9:],
    "followed by more": lambda frame: frame + frame,
    "all zeros": lambda _: frame_of(LAYER),
    "of another window": lambda frame: frame[:4] + bytes([frame[4] ^ 0x20]) + frame[5:],
    "in a dictionary": lambda frame: frame[:4] + bytes([frame[4] | 3]) + frame[5:],
}


@pytest.mark.parametrize("what", FRAMES)
def test_frames_that_are_not_what_they_say(tmp_path: Path, what: str) -> None:
    """With all checksums right: what is declared bounds what comes out."""
    path = tmp_path / "store"
    DiskStore(path, compress="zstd").put(key_of(), rows_of())
    frame = blobs_of(path, key_of())[0]
    replace_blobs(path, key_of(), {0: FRAMES[what](frame)})
    assert_a_miss(path, key_of())


def test_a_frame_takes_no_more_memory_than_the_manifest_says(tmp_path: Path) -> None:
    """A frame of 64 megabytes of zeros in the place of a layer of a few thousand bytes."""
    import tracemalloc

    path = tmp_path / "store"
    DiskStore(path, compress="zstd").put(key_of(), rows_of())
    replace_blobs(path, key_of(), {0: frame_of(1 << 26)})
    store = DiskStore(path)
    tracemalloc.start()
    try:
        with pytest.raises(CacheMiss):
            store.get(key_of())
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
