"""Writing many parts at a time, and telling the disk to begin: calls that not every system has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

if sys.platform == "win32":

    def gather(descriptor: int, parts: Sequence[bytes | memoryview]) -> int:
        """Write the parts, joined; how many bytes that were."""
        return os.write(descriptor, b"".join(parts))

else:

    def gather(descriptor: int, parts: Sequence[bytes | memoryview]) -> int:
        """Write the parts from where they lie; how many bytes that were, which may be fewer than all."""
        return os.writev(descriptor, parts)


if sys.platform == "linux":
    import ctypes

    _sync_file_range = ctypes.CDLL(None).sync_file_range
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait

    def write_back(descriptor: int, start: int, num_bytes: int) -> None:
        """Let the disk begin to write these bytes; only a sync says that they are there."""
        _sync_file_range(descriptor, start, num_bytes, _WRITE)

else:

    def write_back(descriptor: int, start: int, num_bytes: int) -> None:
        """Nothing: the system begins when it is asked to sync."""
