"""What the operating system reads of a mapped file: by itself megabytes around every byte that is touched.

That is right for a file of which everything is wanted, and wrong for one of which layers are to stay unread.
All of this is advice: where it cannot be given (Windows), more is read than was asked for, and nothing else.
"""

from __future__ import annotations

import mmap
import sys

import torch

if sys.platform == "win32":

    def _advise(data: torch.Tensor, start: int, end: int, advice: int) -> None:
        """No such call."""

    _RANDOM = _WILL_NEED = 0
else:
    import ctypes

    # Not through mmap.mmap: before Python 3.13 it holds a file descriptor as long as the mapping lives.
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _RANDOM, _WILL_NEED = mmap.MADV_RANDOM, mmap.MADV_WILLNEED

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


def read_soon(data: torch.Tensor, start: int, end: int) -> None:
    """Start reading some bytes, in as large pieces as the disk takes; returns at once.

    Args:
        data: all bytes of a mapped file.
        start: first of the bytes.
        end: the one behind the last.
    """
    _advise(data, start, end, _WILL_NEED)
