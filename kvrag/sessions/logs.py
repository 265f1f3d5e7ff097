"""The tokens of a saved conversation: a file that is appended to, so that saving costs what is new."""

from __future__ import annotations

import os
import sys
from array import array
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import xxhash

from kvrag.store.files import remove, sync_folder

_SUFFIX = ".tokens"
_WIDTH = 4


@dataclass(frozen=True, slots=True)
class Log:
    """What counts of a log's file: its beginning.

    Attributes:
        number: of the file, which its name ends with.
        num_tokens: int32 each, little-endian.
        checksum: xxh3_128 of their bytes, in hex.
    """

    number: int
    num_tokens: int
    checksum: str


def write(path: Path, tokens: array[int]) -> Log:
    """Have these tokens in a log; what any earlier `Log` of the same file said stays true.

    Args:
        path: of the conversation.
        tokens: all of them.

    Raises:
        OSError: it cannot be written.
    """
    data = _bytes(tokens)
    for number in sorted(_numbers(path), reverse=True):
        if _extend(_file(path, number), data):
            return Log(number, len(tokens), xxhash.xxh3_128_hexdigest(data))
    number = max(_numbers(path), default=0) + 1
    descriptor = os.open(_file(path, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    _append(descriptor, data, 0)
    sync_folder(path.parent)
    return Log(number, len(tokens), xxhash.xxh3_128_hexdigest(data))


def read(path: Path, log: Log) -> array[int]:
    """The tokens that count.

    Raises:
        ValueError: they are not those that were written.
        OSError: the file cannot be read.
    """
    with _file(path, log.number).open("rb") as stream:
        data = stream.read(_WIDTH * log.num_tokens)
    if len(data) != _WIDTH * log.num_tokens or xxhash.xxh3_128_hexdigest(data) != log.checksum:
        raise ValueError("its tokens are other ones")
    tokens = array("i")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def tidy(path: Path, log: Log | None) -> None:
    """Remove the files that do not count any more."""
    for number in _numbers(path):
        if log is None or number != log.number:
            remove(_file(path, number))


def _extend(file: Path, data: bytes) -> bool:
    """Append what is new to a file that begins like the data; False, and nothing changes, if it does not."""
    held = file.read_bytes()
    if not data.startswith(held):
        return False
    _append(os.open(file, os.O_WRONLY | _BINARY), data, len(held))
    return True


def _append(descriptor: int, data: bytes, start: int) -> None:
    try:
        os.lseek(descriptor, start, os.SEEK_SET)
        rest = memoryview(data)[start:]
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbers(path: Path) -> list[int]:
    found = path.parent.glob(f"{escape(path.name)}.*{_SUFFIX}")
    names = [file.name[len(path.name) + 1 : -len(_SUFFIX)] for file in found]
    return [int(name) for name in names if name.isdecimal()]


def _file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}{_SUFFIX}")


def _bytes(tokens: array[int]) -> bytes:
    if sys.byteorder == "little":
        return tokens.tobytes()
    swapped = tokens[:]
    swapped.byteswap()
    return swapped.tobytes()


_BINARY = getattr(os, "O_BINARY", 0)
