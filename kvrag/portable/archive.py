"""The container of a portable collection: a plain tar with fixed names, a list of digests and a signature.

```
kvrag.json                       what the file is
records/000000.jsonl ...         the documents, in parts; sealed: records/000000.sealed
entries/<id>.json                manifest of a cache, as it lies in a store
entries/<id>.safetensors         its data file, as it lies in a store; sealed: entries/<id>.sealed
manifest.jsonl                   name, size and SHA-256 of every member before this one, a line each
manifest.sealed                  of a sealed file: the digest of manifest.jsonl, sealed
signature.json                   Ed25519 over the digest of manifest.jsonl; absent if nobody signed
```

Members come in this order, entries sorted by id, records numbered without holes. Every header is the one
that `header` makes of name and size, to the bit: no links, no owners, no times, no long names, no sparse
files. What is left to attack is the content of the members, and that is under the signature. Nothing is
compressed, so that no small file becomes a large one, and `tar -tf` shows what is in it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvrag.errors import InputError
from kvrag.portable import signing

HEAD, MANIFEST, SEAL, SIGNATURE = "kvrag.json", "manifest.jsonl", "manifest.sealed", "signature.json"
BLOCK = tarfile.BLOCKSIZE
MAX_JSON = 64 << 20  # of any member that is read as a whole
_PIECE = 1 << 20
_MAX_LINE = 512
_END = bytes(2 * BLOCK)
_MEMBER = re.compile(
    r"records/(?P<part>\d{6})\.(jsonl|sealed)|entries/(?P<id>[0-9a-f]{64})\.(?P<kind>json|safetensors|sealed)"
)


class Refused(InputError):
    """A file that is not what it has to be; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file within the archive, and where its bytes lie."""

    name: str
    size: int
    start: int

    @property
    def after(self) -> int:
        """Where the next header begins."""
        return self.start + self.size + -self.size % BLOCK


def header(name: str, size: int) -> bytes:
    """The only header that a member of this name and size has: [512] bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def records_name(part: int, *, is_sealed: bool = False) -> str:
    """Name of a part of the documents."""
    return f"records/{part:06}.{'sealed' if is_sealed else 'jsonl'}"


def entry_names(key_id: str, *, is_sealed: bool = False) -> tuple[str, str]:
    """Names of an entry's manifest and data file."""
    return f"entries/{key_id}.json", f"entries/{key_id}.{'sealed' if is_sealed else 'safetensors'}"


def rank(name: str) -> tuple[int, str, int] | None:
    """The place of a name in the order of members; None: no member has it."""
    fixed = {HEAD: 0, MANIFEST: 3, SEAL: 4, SIGNATURE: 5}
    if name in fixed:
        return fixed[name], "", 0
    found = _MEMBER.fullmatch(name)
    if found is None:
        return None
    if found["part"]:
        return 1, found["part"], 0
    return 2, found["id"], int(found["kind"] != "json")


class Writer:
    """Writes members in order; memory does not grow with them.

    Args:
        file: where to, opened for writing at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.num_bytes = 0

    def add(self, name: str, *parts: bytes | memoryview) -> None:
        """Add a member from memory, its parts one behind the other."""
        size = sum(map(len, parts))
        self._begin(name, size)
        self._finish(name, size, self._copy(parts))

    def add_file(self, name: str, file: BinaryIO, size: int) -> None:
        """Add `size` bytes of an open file.

        Raises:
            InputError: the file has fewer.
        """
        self._begin(name, size)
        pieces = iter(lambda: file.read(_PIECE), b"")
        before = self.num_bytes
        digest = self._copy(pieces)
        if self.num_bytes - before != size:
            raise InputError(f"{name} has changed while it was read; run the same command again")
        self._finish(name, size, digest)

    def finish(
        self,
        sign: Callable[[bytes], tuple[bytes, bytes]] | None,
        seal: Callable[[bytes, str], bytes] | None = None,
    ) -> None:
        """Write the list of members, who holds the key of a sealed file, and who vouches for any.

        Args:
            sign: gives public key and signature of a digest.
            seal: seals the digest under this name.
        """
        size = self._lines.tell()
        digest = hashlib.sha256()
        self._lines.seek(0)
        self._begin(MANIFEST, size)
        while piece := self._lines.read(_PIECE):
            digest.update(piece)
            self._write(piece)
        self._pad(size)
        if seal is not None:
            self._last(SEAL, seal(digest.digest(), MANIFEST))
        if sign is not None:
            public, signature = sign(digest.digest())
            raw = json.dumps(
                {
                    "algorithm": "ed25519",
                    "public_key": signing.line_of(public),
                    "signature": base64.b64encode(signature).decode(),
                }
            ).encode()
            self._last(SIGNATURE, raw)
        self._write(_END)

    def close(self) -> None:
        """Let go of the temporary file."""
        self._lines.close()

    def _last(self, name: str, raw: bytes) -> None:
        """Write a member that no list names."""
        self._begin(name, len(raw))
        self._write(raw)
        self._pad(len(raw))

    def _begin(self, name: str, size: int) -> None:
        self._write(header(name, size))

    def _copy(self, pieces: Iterable[bytes | memoryview]) -> str:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            self._write(piece)
        return digest.hexdigest()

    def _finish(self, name: str, size: int, digest: str) -> None:
        self._pad(size)
        self._lines.write(json.dumps({"name": name, "size": size, "sha256": digest}).encode() + b"\n")

    def _pad(self, size: int) -> None:
        self._write(bytes(-size % BLOCK))

    def _write(self, raw: bytes | memoryview) -> None:
        self._file.write(raw)
        self.num_bytes += len(raw)


class Archive:
    """Reads an archive; opening it proves its form, and `signer` who made it.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read.
        Refused: its form is not that of an archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self.num_bytes = self._file.seek(0, 2)
            found, self.entry_bytes = self._survey()
            self._manifest, self._signature, self._seal = (
                found[MANIFEST],
                found.get(SIGNATURE),
                found.get(SEAL),
            )
        except BaseException:
            self._file.close()
            raise

    def signer(self) -> bytes | None:
        """The public key of who signed; None: nobody did.

        Raises:
            Refused: the signature is none, or is not of this file.
        """
        if self._signature is None:
            return None
        fields = self._json(self._read(self._signature))
        try:
            public = signing.public_key(str(fields["public_key"]))
            signature = base64.b64decode(str(fields["signature"]), validate=True)
            is_ours = fields["algorithm"] == "ed25519"
        except (KeyError, TypeError, InputError, binascii.Error, ValueError) as error:
            raise self._refuse("its signature is not of the expected form") from error
        if not is_ours or not signing.is_signed_by(public, signature, self._digest(self._manifest)):
            raise self._refuse("its signature is wrong: it was changed after it was signed")
        return public

    def seal(self) -> bytes | None:
        """What `Writer.finish` had sealed; None if nothing was."""
        return None if self._seal is None else self._read(self._seal)

    def digest(self) -> bytes:
        """SHA-256 of the list of members."""
        return self._digest(self._manifest)

    def members(self) -> Iterator[tuple[Member, Iterator[bytes]]]:
        """Every member and its bytes in pieces, which have to be read before the next one is asked for.

        The end of a member's pieces proves them.

        Raises:
            Refused: a member is not the one of the list.
        """
        line_at = self._manifest.start
        for member in self._walk():
            if member.name == MANIFEST:
                break
            line, line_at = self._line(line_at)
            if (line.get("name"), line.get("size")) != (member.name, member.size):
                raise self._refuse(f"{member.name} is not what its list of members says")
            yield member, self._pieces(member, str(line.get("sha256")))
        if line_at != self._manifest.start + self._manifest.size:
            raise self._refuse("its list of members names more than there are")

    def whole(self, member: Member, pieces: Iterator[bytes]) -> bytes:
        """A member's bytes at once.

        Raises:
            Refused: it is too large for that.
        """
        if member.size > MAX_JSON:
            raise self._refuse(f"{member.name} has {member.size} bytes; at most {MAX_JSON} are read")
        return b"".join(pieces)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def refuse(self, why: str) -> Refused:
        """The error to raise about the content."""
        return self._refuse(why)

    def _refuse(self, why: str) -> Refused:
        return Refused(f"{self.path} is refused: {why}; nothing was changed")

    def _survey(self) -> tuple[dict[str, Member], int]:
        """Members of fixed names, and bytes of all entries; proves every header and the file's end."""
        found: dict[str, Member] = {}
        before: tuple[int, str, int] = (-1, "", 0)
        at = parts = entry_bytes = 0
        for member in self._walk():
            place = rank(member.name)
            if place is None or place <= before:
                raise self._refuse(f"{member.name!r} is no name for a member, or not in its place")
            if place[0] == 1:
                if int(place[1]) != parts:
                    raise self._refuse(f"{member.name} is not part {parts} of the documents")
                parts += 1
            is_open = before[0] == 2 and not before[2]  # a manifest whose data file has to come now
            if is_open != (place[0] == 2 and place[2] == 1) or (is_open and before[1] != place[1]):
                raise self._refuse(f"at {member.name}, a cache has one of its two files only")
            entry_bytes += member.size if place[0] == 2 else 0
            if place[0] > 2 and any(self._at(member.start + member.size, -member.size % BLOCK)):
                raise self._refuse(f"{member.name} was changed")
            if place[0] not in (1, 2):
                found[member.name] = member
            before, at = place, member.after
        if HEAD not in found or MANIFEST not in found:
            raise self._refuse("it has no head or no list of members")
        if self._at(at, len(_END)) != _END or at + len(_END) != self.num_bytes:
            raise self._refuse("it does not end where its members do")
        return found, entry_bytes

    def _walk(self) -> Iterator[Member]:
        """Members by their headers alone; ends at the first block of zeros."""
        at = 0
        while True:
            raw = self._at(at, BLOCK)
            if raw == bytes(BLOCK):
                return
            try:
                info = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                what = "is no kvrag export" if at == 0 else "is cut off or damaged"
                raise Refused(f"{self.path} {what}; nothing was changed") from error
            if info.size < 0 or raw != header(info.name, info.size):
                raise self._refuse(f"{info.name!r} is not a plain member")
            member = Member(info.name, info.size, at + BLOCK)
            if member.after + len(_END) > self.num_bytes:
                raise self._refuse(f"{member.name} says it has {member.size} bytes, more than the file has")
            yield member
            at = member.after

    def _pieces(self, member: Member, expected: str) -> Iterator[bytes]:
        digest, at, end = hashlib.sha256(), member.start, member.start + member.size
        while at < end:
            piece = self._at(at, min(_PIECE, end - at))
            if not piece:
                raise self._refuse("it is cut off")
            digest.update(piece)
            yield piece
            at += len(piece)
        if digest.hexdigest() != expected or any(self._at(end, member.after - end)):
            raise self._refuse(f"{member.name} was changed or damaged")

    def _line(self, at: int) -> tuple[dict[str, Any], int]:
        end = self._manifest.start + self._manifest.size
        raw = self._at(at, min(_MAX_LINE, end - at))
        line, found, _ = raw.partition(b"\n")
        if not found:
            raise self._refuse("its list of members is cut off")
        return self._json(line), at + len(line) + 1

    def _digest(self, member: Member) -> bytes:
        digest, at, end = hashlib.sha256(), member.start, member.start + member.size
        while at < end:
            piece = self._at(at, min(_PIECE, end - at))
            digest.update(piece)
            at += max(1, len(piece))
        return digest.digest()

    def _read(self, member: Member) -> bytes:
        if member.size > _MAX_LINE:
            raise self._refuse(f"{member.name} is too large")
        return self._at(member.start, member.size)

    def _json(self, raw: bytes) -> dict[str, Any]:
        return parse(raw, lambda: self._refuse("it has a line that is not of the expected form"))

    def _at(self, at: int, size: int) -> bytes:
        try:
            self._file.seek(at)
            return self._file.read(size)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error


def parse(raw: bytes, refuse: Callable[[], Refused]) -> dict[str, Any]:
    """The JSON object in these bytes; what `refuse` gives is raised if there is none."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise refuse() from error
    if not isinstance(found, dict):
        raise refuse()
    return found
