"""What lies in files."""

from __future__ import annotations

from pathlib import Path


def holding(folder: Path, text: bytes) -> list[Path]:
    """Files below a folder that hold some bytes, other than Chroma's graphs of vectors.

    Whoever writes those does not clear memory first, so that pieces of anything this process had in memory,
    such as a test's texts, can lie in their unused parts.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".bin")
    return [path for path in files if text in path.read_bytes()]
