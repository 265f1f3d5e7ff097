"""Reading files past the page cache, into memory of this process (O_DIRECT).

For stores much larger than memory, on disks faster than the page cache: what is read once does not push out
what is read often. It costs what mapped files give for nothing: bytes belong to the process, others read
them again, and so does this one after a restart. docs/measured.md says what it brings.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from functools import partial
from pathlib import Path

import torch

from kvrag.store.layout import Damaged
from kvrag.store.together import together

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 4096  # a multiple of every disk's block
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectReads:
    """Reads whole files directly for as long as the file system lets it; then says so once, and no more.

    Attributes:
        works: False once it was refused, or on a system that has no such reads.
    """

    def __init__(self) -> None:
        self.works = hasattr(os, "O_DIRECT") and hasattr(os, "preadv")

    def read(self, path: Path, size: int) -> torch.Tensor | None:
        """All bytes of a file, [size] uint8; None if they cannot be read directly and have to be mapped.

        Args:
            path: of the file.
            size: bytes that it has to have.

        Raises:
            Damaged: another size, or the file cannot be read.
        """
        if not self.works or size == 0:
            return None
        try:
            return _read(path, size)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise Damaged(f"the data file cannot be read: {error}") from error
            self.works = False
            logger.info("no direct reads in %s, its files are mapped: %s", path.parent, error)
            return None


def _read(path: Path, size: int) -> torch.Tensor:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise Damaged(f"the data file has {found} bytes, its manifest says {size}")
        # Fresh pages start at a page's border; large ones are zeroed and mapped in a fraction of the time.
        # Only private memory gets them: by default Python asks for memory to share with children.
        memory = mmap.mmap(
            -1, -(-size // _BLOCK_BYTES) * _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON
        )
        memory.madvise(getattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NORMAL))
        view = memoryview(memory)
        together([partial(_fill, descriptor, view, at, size) for at in range(0, len(memory), _PIECE_BYTES)])
        return torch.frombuffer(memory, dtype=torch.uint8, count=size)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, view: memoryview, at: int, size: int) -> None:
    """Read one piece to its place.

    Raises:
        Damaged: the file has become shorter.
    """
    end = min(at + _PIECE_BYTES, len(view))
    while at < min(end, size):
        count = os.preadv(descriptor, [view[at:end]], at)
        if count == 0:
            raise Damaged("the data file was cut while it was read")
        at += count
