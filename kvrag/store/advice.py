"""What the operating system reads of a mapped file: by itself megabytes around every byte that is touched.

That is wrong for a file of which layers are to stay unread, and too little for one that is wanted as a whole.
All of this is advice: where it cannot be given (Windows), more is read than was asked for, or more slowly,
and nothing else.
"""

from __future__ import annotations

import mmap
import sys

import torch

if sys.platform == "win32":

    def _advise(data: torch.Tensor, start: int, end: int, advice: int) -> None:
        """No such call."""

    _RANDOM = _WILL_NEED = _HUGE_PAGES = _POPULATE = 0
else:
    import ctypes

    # Not through mmap.mmap: before Python 3.13 it holds a file descriptor as long as the mapping lives.
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _RANDOM, _WILL_NEED = mmap.MADV_RANDOM, mmap.MADV_WILLNEED
    # Linux' own; elsewhere advice that changes nothing.
    _HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NORMAL)
    _POPULATE = 22 if sys.platform == "linux" else mmap.MADV_NORMAL  # MADV_POPULATE_READ, from 5.14 on

    def _advise(data: torch.Tensor, start: int, end: int, advice: int) -> None:
        first = (data.data_ptr() + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            _madvise(first, data.data_ptr() + end - first, advice)


def read_nothing_ahead(data: torch.Tensor) -> None:
    """From now on touching a byte reads its own page only.

    Args:
        data: all bytes of a mapped file.
    """
    _advise(data, 0, data.nbytes, _RANDOM)


def read_in_large_pages(data: torch.Tensor) -> None:
    """From now on touching a byte reads two megabytes around it and the two behind, into one page each.

    Linux maps such a page at once, where the file system can have them (ext4 from 6.16 on, XFS, btrfs):
    reading a file takes a few page faults then instead of thousands, and later walks miss the TLB less.

    Args:
        data: all bytes of a mapped file.
    """
    _advise(data, 0, data.nbytes, _HUGE_PAGES)


def read_soon(data: torch.Tensor, start: int, end: int) -> None:
    """Start reading some bytes, in as large pieces as the disk takes; returns at once.

    Args:
        data: all bytes of a mapped file.
        start: first of the bytes.
        end: the one behind the last.
    """
    _advise(data, start, end, _WILL_NEED)


def read_now(data: torch.Tensor, start: int, end: int) -> None:
    """Read some bytes and map them in; other threads of Python run meanwhile.

    Touching them does the same, a page at a time, and in pure Python code with the interpreter held.

    Args:
        data: all bytes of a mapped file.
        start: first of the bytes.
        end: the one behind the last.
    """
    _advise(data, start, end, _POPULATE)
