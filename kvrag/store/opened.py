"""One object of a bucket of which some bytes are here."""

from __future__ import annotations

import re

import torch

from kvrag.store import layout
from kvrag.store.bucket import Bucket
from kvrag.store.layout import Damaged, Manifest
from kvrag.store.moving import HEADER_BYTES, Frame

_NAME = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})\.kvrag")
_FIRST = 64 << 10  # holds frame, manifest and header of nearly every entry


def object_name(key_id: str) -> str:
    """Name of an entry's object."""
    return f"{key_id[:2]}/{key_id}.kvrag"


def entry_of(name: str) -> str | None:
    """The entry whose object has this name; None: it is no entry's."""
    found = _NAME.fullmatch(name)
    return None if found is None else found[2]


class OpenedObject:
    """Frame and manifest of an object, and of its data what was fetched.

    Args:
        bucket: where it lies.
        name: of the object.

    Raises:
        Damaged: it does not begin like an entry.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        first = bucket.read(name, 0, _FIRST)
        self.frame = frame = Frame.parse(first)
        if frame.data_start > len(first) == _FIRST:
            first += bucket.read(name, _FIRST, frame.data_start)
        self.raw_manifest = first[HEADER_BYTES : HEADER_BYTES + frame.manifest_bytes]
        self.manifest: Manifest = layout.parse_manifest(self.raw_manifest)
        if frame.data_bytes != self.manifest.file_size:
            raise Damaged("the object and its manifest disagree in the length of the data")
        # Pages that nothing is fetched into are never taken from the system.
        self.data = torch.empty(frame.data_bytes, dtype=torch.uint8)
        here = first[frame.data_start :][: frame.data_bytes]
        self.data.numpy().data[: len(here)] = here
        self._first_bytes = len(here)

    def fetch(self, start: int, end: int) -> None:
        """Have bytes `start` to `end` of the data here.

        Raises:
            Damaged: the object ends before.
        """
        start = max(start, self._first_bytes)
        if start >= end:
            return
        place = self.data.numpy().data[start:end]
        if self._bucket.read_into(self._name, self.frame.data_start + start, place) != end - start:
            raise Damaged("the object is shorter than its manifest says")
