"""A few threads that wait for disks side by side: for pages that are read, for files that are synced.

One call after another leaves a disk idle between them; several at once keep it busy, also on a single core.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 6

T = TypeVar("T")


class _Pool:
    """Threads of one process, made when first needed; a forked child has its parent's object without them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner, self._threads = -1, None

    _threads: ThreadPoolExecutor | None

    def submit(self, call: Callable[[], None]) -> Future[None]:
        if self._owner != os.getpid():
            self._lock = threading.Lock()  # the parent's may have been held when it forked
            self._threads, self._owner = None, os.getpid()
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS - 1, "kvrag-store")
            return self._threads.submit(call)


_pool = _Pool()


def soon(call: Callable[[], None]) -> None:
    """Make a call in one of the threads, some time; nobody hears of its result."""
    _pool.submit(call)


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of all calls, made by this thread and a few others.

    This thread takes whatever nobody else has begun, so that calls may themselves call this function.

    Raises:
        BaseException: of the first call, in their order, that raised one; all of them have ended by then.
    """
    left = deque(enumerate(calls))
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while True:
            try:
                number, call = left.popleft()
            except IndexError:
                return
            try:
                results[number] = call()
            except BaseException as error:  # raised again below, in the caller's thread
                errors[number] = error

    helpers = [_pool.submit(work) for _ in range(min(len(calls), THREADS) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(calls))]
