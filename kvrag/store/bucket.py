"""Objects by name, wherever fsspec reaches: buckets, shared folders, memory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvrag.errors import ConfigError, MissingExtra
from kvrag.store.files import PARTIAL, commit, make_folder, remove, write_partial

_PIECE = 16 << 20
# Where one upload appears whole or not at all. Elsewhere an object is written beside its place and moved.
_ATOMIC = frozenset("abfs abfss az gcs gs memory oci oss s3 s3a".split())


@dataclass(frozen=True, slots=True)
class Object:
    """One object as a list says.

    Attributes:
        name: below the root.
        num_bytes: its length.
        modified: when it was written, in seconds since 1970; 0 if the list does not say.
    """

    name: str
    num_bytes: int
    modified: float


class Bucket:
    """A folder of objects at a URL that any library of fsspec's serves.

    Errors are those of that library, whatever they are; it is also what tries again after a failure.

    Args:
        url: such as s3://bucket/prefix, file:///mnt/shared/caches, memory://name, or a path.
        options: for the file system, such as `key`, `endpoint_url`, `anon`.

    Raises:
        ConfigError: no such kind of URL, or options that it does not have.
        MissingExtra: fsspec, or its package for S3, is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            import fsspec  # noqa: PLC0415  # an extra
            from fsspec.implementations.local import LocalFileSystem  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtra("fsspec", "objects") from error
        # Others change the bucket, too: a list that was true a minute ago is no use.
        options = {"use_listings_cache": False, **options}
        try:
            self._fs, root = fsspec.url_to_fs(url, **options)
        except ImportError as error:
            if url.split(":", maxsplit=1)[0] in ("s3", "s3a"):
                raise MissingExtra("s3fs", "s3") from error
            raise ConfigError(f"{url}: fsspec cannot open this: {error}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{url}: fsspec cannot open this: {error}") from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        protocol = self._fs.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_atomic = not _ATOMIC.isdisjoint(names)
        self._has_buckets = self._is_atomic and "memory" not in names

    def read(self, name: str, start: int, end: int) -> bytes:
        """Some bytes of an object, fewer if it ends before.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._fs.cat_file(self._path(name), start=start, end=end)
        return bytes(found)

    def read_into(self, name: str, start: int, place: memoryview) -> int:
        """Fill memory with an object's bytes from `start` on, in pieces that may be read at once.

        Returns:
            How many bytes came.
        """
        starts = list(range(start, start + len(place), _PIECE))
        ends = [min(at + _PIECE, start + len(place)) for at in starts]
        filled = 0
        for piece in self._fs.cat_ranges([self._path(name)] * len(starts), starts, ends, on_error="raise"):
            place[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        """Put an object in its place, whole or not at all."""
        path = self._path(name)
        partial = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
        if self._is_local:
            make_folder(Path(path).parent)
            try:
                write_partial(Path(partial), parts)
                commit(Path(partial), Path(path))
            finally:
                remove(Path(partial))
        elif self._is_atomic:
            self._fs.pipe_file(path, b"".join(parts))
        else:
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            self._fs.pipe_file(partial, b"".join(parts))
            self._fs.mv(partial, path)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            return int(self._fs.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> bool:
        """Remove an object; False if there was none."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def move(self, name: str, to: str) -> None:
        """Give an object another name."""
        self._fs.makedirs(os.path.dirname(self._path(to)), exist_ok=True)
        self._fs.mv(self._path(name), self._path(to))

    def list(self, folder: str = "", wanted: Callable[[str], bool] = bool) -> Iterator[Object]:
        """Objects below a folder of the root whose names are wanted."""
        at = self._path(folder) if folder else self._root
        try:
            found = self._fs.find(at, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            name = path[len(self._root) :].lstrip("/")
            if wanted(name):
                yield Object(name, int(info["size"]), _modified(info))

    def probe(self) -> None:
        """Ask once whether the bucket can be read.

        Raises:
            FileNotFoundError: there is no such bucket. (A folder that is not there yet is none.)
            Exception: whatever the library raises: no permission, no network, ...
        """
        try:
            self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            if self._has_buckets and not self._fs.exists(self._root.split("/")[0]):
                raise

    def address(self, name: str) -> str:
        """The object's URL, without anything secret."""
        return str(self._fs.unstrip_protocol(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def is_refusal(error: Exception) -> bool:
    """Whether trying again helps nobody: no credentials, wrong ones, no permission, no such bucket."""
    return isinstance(error, (PermissionError, FileNotFoundError)) or "Credentials" in type(error).__name__


def in_words(error: Exception) -> str:
    """An error of a file system's library, and what can be done where that is known."""
    if isinstance(error, PermissionError):
        return f"access was denied ({error}); check the credentials and what they allow"
    if "Credentials" in type(error).__name__:
        return f"there are no credentials ({error}); docs/tiers.md says where they can be"
    return repr(error)


def _modified(info: Mapping[str, Any]) -> float:
    """When an object was written, as far as this kind of file system says."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        found = info.get(name)
        with suppress(ValueError):
            if isinstance(found, str):
                found = datetime.fromisoformat(found)
            if isinstance(found, datetime):
                return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
            if isinstance(found, (int, float)):
                return float(found)
    return 0.0
