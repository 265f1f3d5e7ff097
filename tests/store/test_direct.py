import errno
import logging
import os
from pathlib import Path

import pytest

from kvrag.store.direct import DirectReads
from kvrag.store.layout import Damaged

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")


def make(path: Path, size: int) -> bytes:
    raw = os.urandom(size)
    path.write_bytes(raw)
    return raw


@pytest.mark.parametrize("size", [1, 511, 4096, 4097, 100_000, (4 << 20) + 1, (12 << 20) - 5])
def test_every_byte_or_nothing(tmp_path: Path, size: int) -> None:
    raw = make(tmp_path / "file", size)
    reads = DirectReads()
    found = reads.read(tmp_path / "file", size)
    assert (found is not None) == reads.works  # some file systems have no direct reads
    if found is not None:
        assert found.numpy().tobytes() == raw
        assert found.data_ptr() % 4096 == 0


def test_it_reads_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "file", 10_000)
    flags, original = [], os.open

    def opened(path: Path, how: int) -> int:
        flags.append(how)
        return original(path, how & ~os.O_DIRECT)  # also where the file system would refuse

    monkeypatch.setattr(os, "open", opened)
    assert DirectReads().read(tmp_path / "file", 10_000) is not None
    assert flags[0] & os.O_DIRECT


@pytest.mark.parametrize("call", ["open", "preadv"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_refusal_is_remembered_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, number: int
) -> None:
    make(tmp_path / "file", 10)
    asked = 0

    def refuse(*_: object) -> int:
        nonlocal asked
        asked += 1
        raise OSError(number, os.strerror(number))

    if call == "preadv":
        original = os.open
        monkeypatch.setattr(os, "open", lambda path, how: original(path, how & ~os.O_DIRECT))
    monkeypatch.setattr(os, call, refuse)
    reads = DirectReads()
    with caplog.at_level(logging.INFO):
        assert reads.read(tmp_path / "file", 10) is None
        assert reads.read(tmp_path / "file", 10) is None
    assert (asked, reads.works, len(caplog.records)) == (1, False, 1)


def test_damage_is_told_from_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "file", 5000)
    reads, original = DirectReads(), os.open
    monkeypatch.setattr(os, "open", lambda path, how: original(path, how & ~os.O_DIRECT))
    with pytest.raises(Damaged, match="has 5000 bytes"):
        reads.read(tmp_path / "file", 4999)
    with pytest.raises(Damaged, match="cannot be read"):
        reads.read(tmp_path / "none", 5000)
    assert reads.read(tmp_path / "file", 5000) is not None
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(Damaged, match="was cut"):
        reads.read(tmp_path / "file", 5000)
    assert reads.works


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    make(tmp_path / "file", 5000)
    before = len(os.listdir("/proc/self/fd"))
    kept = [DirectReads().read(tmp_path / "file", 5000) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 5
