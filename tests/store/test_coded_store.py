"""A store whose rows are written in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvrag.errors import CacheMiss, ConfigError
from kvrag.rotary import Rotation
from kvrag.segments import KV, LayerKV
from kvrag.store.codec import CODECS
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

TOKENS = tuple(range(100, 170))
SHAPES = ((2, 8, 6), (1, 16, 8), (2, 8, 6))  # values that end anywhere, layers of different sizes
ROTATIONS = (Rotation((1.0, 0.1, 0.01, 0.001)), None, Rotation((0.5, 0.25), start=2))
ROWS = example_rows(TOKENS, dtype=torch.bfloat16, shapes=SHAPES)
LOSSY = [name for name in CODECS if name != "raw"]


def key_of(codec: str) -> EntryKey:
    return EntryKey(example_fingerprint(dtype="bfloat16", codec=codec, rotations=ROTATIONS), TOKENS)


def coded(codec: str) -> KV:
    """The rows as this codec gives them back."""
    found = CODECS[codec]
    pairs = zip(ROWS.layers, ROTATIONS, strict=True)
    return KV(TOKENS, tuple(found.unpack(found.pack(x, turn), torch.bfloat16, turn) for x, turn in pairs))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("by_layer", [False, True], ids=["at once", "by layer"])
def test_rows_come_back_as_the_codec_gives_them(tmp_path: Path, codec: str, *, by_layer: bool) -> None:
    DiskStore(tmp_path).put(key_of(codec), ROWS)
    store = DiskStore(tmp_path)
    found = store.get(key_of(codec), by_layer=by_layer)
    assert_same_rows(found, coded(codec))
    assert_same_rows(store.get(key_of(codec)), coded(codec))
    (file,) = tmp_path.glob("*/*.safetensors")
    header_and_tokens = file.stat().st_size - store.stats().bytes_read
    assert 4 * len(TOKENS) < header_and_tokens < 4096
    assert store.check().ok


@pytest.mark.parametrize("codec", LOSSY)
def test_a_layer_is_decoded_when_it_is_touched(tmp_path: Path, codec: str) -> None:
    DiskStore(tmp_path).put(key_of(codec), ROWS)
    store = DiskStore(tmp_path)
    found = store.get(key_of(codec), by_layer=True)
    assert store.stats().bytes_read == found.num_bytes_touched == 0
    first = found.layers[0]
    assert found.layers[0] is first  # not decoded twice
    assert found.num_bytes_touched == first.num_bytes < found.num_bytes == ROWS.num_bytes
    written = CODECS[codec].parts(SHAPES[0], len(TOKENS), torch.bfloat16)
    assert store.stats().bytes_read == sum(part.num_bytes for part in written)
    expected = coded(codec)
    assert_same_rows(KV(TOKENS, (first,)), KV(TOKENS, (expected.layers[0],)))


@pytest.mark.parametrize("codec", CODECS)
def test_any_reader_of_safetensors_reads_the_file(tmp_path: Path, codec: str) -> None:
    DiskStore(tmp_path).put(key_of(codec), ROWS)
    (file,) = tmp_path.glob("*/*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert tensors.metadata()["codec"] == codec
        parts = CODECS[codec].parts(SHAPES[1], len(TOKENS), torch.bfloat16)
        for part, expected in zip(parts, CODECS[codec].pack(ROWS.layers[1], None), strict=True):
            found = tensors.get_tensor(f"001.{part.name}")
            assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("by_layer", [False, True], ids=["at once", "by layer"])
def test_a_flipped_bit_is_a_miss(tmp_path: Path, codec: str, *, by_layer: bool) -> None:
    DiskStore(tmp_path).put(key_of(codec), ROWS)
    (file,) = tmp_path.glob("*/*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-4 * len(TOKENS) - 1] ^= 1  # in the last layer
    file.write_bytes(raw)
    store = DiskStore(tmp_path)
    with pytest.raises(CacheMiss):
        _ = tuple(store.get(key_of(codec), by_layer=by_layer).layers)
    assert store.stats().damaged == 1


def test_codecs_do_not_share_entries(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for codec in CODECS:
        with pytest.raises(CacheMiss):
            store.get(key_of(codec))
        store.put(key_of(codec), ROWS)
    assert store.stats().entries == len(CODECS)
    assert_same_rows(store.get(key_of("raw")), ROWS)


def test_keys_without_rotations_are_refused(tmp_path: Path) -> None:
    """Rows decoded without them would be wrong, and look right."""
    store, key = DiskStore(tmp_path), key_of("int8")
    lacking = EntryKey(replace(key.fingerprint, rotations=()), TOKENS)
    assert lacking.id == key.id
    with pytest.raises(ConfigError, match="rotations of 3 layers and has 0"):
        store.put(lacking, ROWS)
    assert list(store.ids()) == []
    store.put(key, ROWS)
    with pytest.raises(ConfigError, match="rotations of 3 layers and has 0"):
        store.get(lacking)
    assert_same_rows(store.get(key), coded("int8"))


def test_what_no_codec_can_write_is_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(ConfigError, match="no codec 'zip'"):
        store.put(key_of("zip"), ROWS)
    odd = KV((1, 2), (LayerKV(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)),))
    with pytest.raises(ConfigError, match="pairs of channels"):
        store.put(EntryKey(example_fingerprint(codec="int4", rotations=(None,)), (1, 2)), odd)
    assert list(store.ids()) == []
