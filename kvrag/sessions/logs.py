"""The tokens of a saved conversation: a file that is appended to, so that saving costs what is new."""

from __future__ import annotations

import json
import os
import sys
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import xxhash

from kvrag.sessions.vault import PLAIN, Vault
from kvrag.store.damage import Damaged
from kvrag.store.files import remove, sync_folder
from kvrag.store.sealing import Cipher

FORMAT = "kvrag session tokens"
_SUFFIX = ".tokens"
_WIDTH = 4
_LENGTH = 4  # bytes that say how long an encrypted piece is


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


def write(path: Path, tokens: array[int], vault: Vault = PLAIN) -> Log:
    """Have these tokens in a log; what any earlier `Log` of the same file said stays true.

    Args:
        path: of the conversation.
        tokens: all of them.
        vault: what they are encrypted with.

    Raises:
        OSError: it cannot be written.
    """
    data = _bytes(tokens)
    for number in sorted(_numbers(path), reverse=True):
        if _extend(_file(path, number), data, vault):
            return Log(number, len(tokens), xxhash.xxh3_128_hexdigest(data))
    number = max(_numbers(path), default=0) + 1
    descriptor = os.open(_file(path, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    _append(descriptor, data if vault.key is None else _begun(data, vault), 0)
    sync_folder(path.parent)
    return Log(number, len(tokens), xxhash.xxh3_128_hexdigest(data))


def read(path: Path, log: Log, vault: Vault = PLAIN) -> array[int]:
    """The tokens that count.

    Raises:
        ValueError: they are not those that were written.
        OSError: the file cannot be read.
    """
    size = _WIDTH * log.num_tokens
    if vault.key is None:
        with _file(path, log.number).open("rb") as stream:
            data = stream.read(size)
    else:
        found = bytearray()
        for piece in _pieces(_file(path, log.number), vault):
            found += piece
            if len(found) >= size:  # what stands behind it may be half of a piece
                break
        data = bytes(found[:size])
    if len(data) != size or xxhash.xxh3_128_hexdigest(data) != log.checksum:
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


def _extend(file: Path, data: bytes, vault: Vault) -> bool:
    """Append what is new to a file that begins like the data; False, and nothing changes, if it does not."""
    if vault.key is None:
        held = file.read_bytes()
        if not data.startswith(held):
            return False
        _append(os.open(file, os.O_WRONLY | _BINARY), data[len(held) :], len(held))
        return True
    try:
        pieces = list(_pieces(file, vault))
        held, cipher = b"".join(pieces), _cipher(file, vault)[0]
    except ValueError:  # of another key, or a crash has left half a piece
        return False
    if not data.startswith(held):
        return False
    piece = _piece(data[len(held) :], len(pieces), cipher) if len(data) > len(held) else b""
    _append(os.open(file, os.O_WRONLY | _BINARY), piece, file.stat().st_size)
    return True


def _begun(data: bytes, vault: Vault) -> bytes:
    """An encrypted file: length and JSON of a header, then pieces, each behind its length."""
    about = {"format": FORMAT, **vault.about(uuid.uuid4().hex)}
    header = json.dumps(about).encode()
    cipher = vault.sealing(about["id"])
    assert cipher is not None
    return len(header).to_bytes(8, "little") + header + (_piece(data, 0, cipher) if data else b"")


def _piece(data: bytes, number: int, cipher: Cipher) -> bytes:
    blob = cipher.seal([data], "tokens", str(number))
    return len(blob).to_bytes(_LENGTH, "little") + bytes(blob)


def _cipher(file: Path, vault: Vault) -> tuple[Cipher, int]:
    """What opens a file, and where its pieces begin.

    Raises:
        ValueError: this vault does not open it.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            about = json.loads(stream.read(min(size, 1 << 16)))
            is_mine = about["format"] == FORMAT and about["tenant"] == vault.label
            is_mine = is_mine and vault.key is not None and vault.key.is_called(about["key_id"])
            cipher = vault.sealing(about["id"]) if is_mine else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"its tokens are in no such file: {error!r}") from error
    if cipher is None:
        raise ValueError("its tokens are encrypted otherwise")
    return cipher, 8 + size


def _pieces(file: Path, vault: Vault) -> Iterator[bytes]:
    """The tokens' bytes, piece by piece.

    Raises:
        ValueError: one is not whole, or not as it was.
    """
    cipher, at = _cipher(file, vault)
    raw, number = memoryview(file.read_bytes()), 0
    while at < len(raw):
        start = at + _LENGTH
        at = start + int.from_bytes(raw[at:start], "little")
        if at > len(raw):
            raise ValueError("its tokens are cut off")
        try:
            yield cipher.open(raw[start:at], "tokens", str(number)).numpy().tobytes()
        except Damaged as damage:
            raise ValueError(str(damage)) from damage
        number += 1


def _append(descriptor: int, data: bytes, start: int) -> None:
    try:
        os.lseek(descriptor, start, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
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
