"""One thread that owns the model, and streams that carry its results to callers.

The model computes inside `torch.inference_mode()`, which must never be left half-way by a generator that
yields to a caller. So generators run here, and what they yield travels through a mailbox. Running jobs take
turns, one step each, so a long answer does not hold up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, TypeVar

import torch

from kvrag.errors import EngineClosed, GenerationCancelled

T = TypeVar("T")


class _End:
    """Marks the end of a stream in its mailbox."""


class _Job(Generic[T]):
    """A generator to run, its mailbox and its stop flag; outlives the stream that its caller may drop."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self.make = make
        self.iterator: Iterator[T] | None = None
        self.mailbox: queue.SimpleQueue[T | BaseException | _End] = queue.SimpleQueue()
        self.is_cancelled = threading.Event()
        self.wake: Callable[[], None] | None = None

    def post(self, item: T | BaseException | _End) -> None:
        self.mailbox.put(item)
        if (wake := self.wake) is not None:
            with contextlib.suppress(RuntimeError):  # the caller's event loop is gone
                wake()

    def step(self) -> bool:
        """Run until the next result; False when there are no more."""
        if self.is_cancelled.is_set():
            self._close()
            self.post(GenerationCancelled("the answer was cancelled"))
            return False
        try:
            if self.iterator is None:
                self.iterator = self.make()
            self.post(next(self.iterator))
        except StopIteration:
            self.post(_End())
            return False
        except BaseException as error:
            self._close()
            self.post(error)
            return False
        return True

    def abandon(self) -> None:
        """Stop for good, because the thread ends."""
        self._close()
        self.post(EngineClosed("the engine was closed before this was complete"))

    def _close(self) -> None:
        close = getattr(self.iterator, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):  # of a job that nobody waits for: must not end the thread
                close()


class Stream(Generic[T]):
    """Results of a job as they come: iterate it, or iterate it with `async for`.

    Dropping the stream, leaving its `with` block or calling `cancel` stops the job after its current step.
    """

    def __init__(self, job: _Job[T]) -> None:
        """Wrap a submitted job."""
        self._job = job
        self._is_done = False

    def cancel(self) -> None:
        """Stop the job after its current step; a waiting iteration ends with `GenerationCancelled`."""
        self._job.is_cancelled.set()

    def __iter__(self) -> Iterator[T]:
        """The stream itself."""
        return self

    def __next__(self) -> T:
        """Wait for the next result; errors of the job are raised here."""
        if self._is_done:
            raise StopIteration
        return self._open(self._job.mailbox.get(), StopIteration)

    async def __aiter__(self) -> AsyncGenerator[T, None]:
        """Results without blocking the event loop."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        self._job.wake = wake
        try:
            while not self._is_done:
                await asyncio.sleep(0)  # results that are there already must not hold up the loop
                ready.clear()
                try:
                    item = self._job.mailbox.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    continue
                try:
                    yield self._open(item, StopAsyncIteration)
                except StopAsyncIteration:
                    return
        finally:
            self._job.wake = None
            self.cancel()

    def _open(self, item: T | BaseException | _End, end: type[Exception]) -> T:
        if isinstance(item, _End):
            self._is_done = True
            raise end
        if isinstance(item, BaseException):
            self._is_done = True
            raise item
        return item

    def __enter__(self) -> Stream[T]:
        """Cancel on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the job."""
        self.cancel()

    def __del__(self) -> None:
        """A stream that nobody reads any more needs no further steps."""
        self._job.is_cancelled.set()


class Worker:
    """The thread; starts with the first job and ends with `close`."""

    def __init__(self, name: str = "kvrag") -> None:
        """Make an idle worker."""
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, make: Callable[[], Iterator[T]]) -> Stream[T]:
        """Run a generator on the worker's thread.

        Args:
            make: called on that thread; every value it yields reaches the stream.

        Raises:
            EngineClosed: the worker was closed.
        """
        job = _Job(make)
        with self._lock:
            if self._is_closed:
                raise EngineClosed("the engine is closed; create a new one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put(job)  # type: ignore[arg-type]  # a mailbox only ever gets its own job's results
        return Stream(job)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the worker's thread and wait for its result.

        Raises:
            EngineClosed: the worker was closed, before or meanwhile.
        """
        if threading.current_thread() is self._thread:
            return function()

        def once() -> Iterator[T]:
            yield function()

        return next(self.submit(once))

    def close(self) -> None:
        """End the thread and wait for it; whoever waits for a result gets `EngineClosed`."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._jobs.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        running: deque[_Job[object]] = deque()
        with torch.inference_mode():
            while True:
                while not running or not self._jobs.empty():
                    job = self._jobs.get()
                    if job is None:
                        self._end(running)
                        return
                    running.append(job)
                job = running.popleft()
                if job.step():
                    running.append(job)
                del job  # while we wait for the next one, this one's memory is free

    def _end(self, running: deque[_Job[object]]) -> None:
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                running.append(job)
        for job in running:
            job.abandon()
