"""What Chroma's graph files must not carry: pieces of memory that the process had freed before.

A collection's graph is made for a number of rows and written as it lies in memory, rows that nobody uses yet
included, and its writer does not clear that memory first. Whatever the process worked on before, texts
included, can so come to lie in a file, beside records that are encrypted.
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path

logger = logging.getLogger(__name__)

# hnswlib's header as Chroma 1.x writes it: version, offset of level 0, rows made, rows used, bytes of a row,
# offsets of label and vector, highest level, entry, three sizes of neighbour lists, a factor, a width.
_HEADER = struct.Struct("=i6QiI3QdQ")
_VERSION = 1
_LENGTH_BYTES = 4  # of one row in length.bin


class GraphFiles:
    """The graph files in the folder of a Chroma database, whose unused rows `blank` overwrites."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._seen: dict[Path, int] = {}

    def blank(self) -> None:
        """Write zeros over rows that no record has, in files that were written since last time.

        Nobody else may write to the folder meanwhile. A file that is not as expected is left as it is, and
        what cannot be written is told in the log.
        """
        for header in self._folder.glob("*/header.bin"):
            try:
                written = header.stat().st_mtime_ns
                if self._seen.get(header) != written:
                    _blank_one(header)
                    self._seen[header] = written
            except OSError as error:
                logger.warning("pieces of memory may lie in %s: %s", header.parent, error)


def _blank_one(header: Path) -> None:
    raw = header.read_bytes()
    if len(raw) != _HEADER.size:
        return
    version, _, made, used, row_bytes, *_ = _HEADER.unpack(raw)
    if version != _VERSION or used > made:
        return
    for name, width in (("data_level0.bin", row_bytes), ("length.bin", _LENGTH_BYTES)):
        path = header.with_name(name)
        size = path.stat().st_size
        if used * width < size <= made * width:
            with path.open("r+b") as file:
                file.seek(used * width)
                file.write(bytes(size - used * width))
