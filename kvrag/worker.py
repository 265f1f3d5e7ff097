"""One thread that owns the model, and streams that carry its results to callers.

The model computes inside `torch.inference_mode()`, which must never be left half-way by a generator that
yields to a caller. So generators run here, and what they yield travels through a mailbox. Running jobs take
turns, one step each, so a long answer does not hold up the others. What jobs ask the worker for (`Ask`) is
done for several of them in one go; they join and leave between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from kvrag.errors import EngineClosed, GenerationCancelled

T = TypeVar("T")


class Ask:
    """What a job yields to have it done by the worker, together with what other jobs ask for.

    It is sent the outcome; an outcome that is an exception is raised where it asked.
    """


class Pause(Ask):
    """Nothing is to be done: the others have their turns."""


PAUSE = Pause()


class Server(Protocol):
    """Does what jobs ask for."""

    def choose(self, asks: Sequence[Any]) -> list[int]:
        """Numbers of those that are done next, at least one; who has waited longest comes first."""
        ...

    def run(self, asks: Sequence[Any]) -> Sequence[Any]:
        """Do these; the outcome of each, an exception if it failed."""
        ...


class _End:
    """Marks the end of a stream in its mailbox."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class _Job(Generic[T]):
    """A generator to run, its mailbox and its stop flag; outlives the stream that its caller may drop."""

    def __init__(self, make: Callable[[], Iterator[T | Ask]], *, in_line: bool = False) -> None:
        self.make = make
        self.in_line = in_line
        self.iterator: Iterator[T | Ask] | None = None
        self.ask: Ask | None = None
        self.mailbox: queue.SimpleQueue[T | BaseException | _End] = queue.SimpleQueue()
        self.is_cancelled = threading.Event()
        self.wake: Callable[[], None] | None = None
        self._outcome: Any = None
        self._has_asked = False

    def post(self, item: T | BaseException | _End) -> None:
        self.mailbox.put(item)
        if (wake := self.wake) is not None:
            with contextlib.suppress(RuntimeError):  # the caller's event loop is gone
                wake()

    def step(self) -> bool:
        """Run until the next result; False when there are no more.

        Jobs that ask run until they ask again: so all of them have asked when it is done.
        """
        if self.stop_if_cancelled():
            return False
        try:
            item = self._next()
            while not isinstance(item, Ask):
                self.post(item)
                if not self._has_asked:
                    return True
                if self.stop_if_cancelled():
                    return False
                item = self._next()
        except StopIteration as end:
            self.post(_End(end.value))
            return False
        except BaseException as error:
            self._close()
            self.post(error)
            return False
        if item is not PAUSE:
            self.ask, self._has_asked = item, True
        return True

    def take(self, outcome: Any) -> None:
        """Go on with this at the next step."""
        self.ask, self._outcome = None, outcome

    def stop_if_cancelled(self) -> bool:
        """Stop for good, if the caller wants no more."""
        if self.is_cancelled.is_set():
            self._close()
            self.post(GenerationCancelled("the answer was cancelled"))
            return True
        return False

    def abandon(self) -> None:
        """Stop for good, because the thread ends."""
        self._close()
        self.post(EngineClosed("the engine was closed before this was complete"))

    def _next(self) -> T | Ask:
        if self.iterator is None:
            self.iterator = self.make()
        outcome, self._outcome = self._outcome, None
        if not isinstance(self.iterator, Generator):
            return next(self.iterator)
        if isinstance(outcome, BaseException):
            item: T | Ask = self.iterator.throw(outcome)
            return item
        item = self.iterator.send(outcome)
        return item

    def _close(self) -> None:
        close = getattr(self.iterator, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):  # of a job that nobody waits for: must not end the thread
                close()
        self.iterator = self.ask = self._outcome = None  # rows are free now, not when the caller looks


class Stream(Generic[T]):
    """Results of a job as they come: iterate it, or iterate it with `async for`.

    Dropping the stream, leaving its `with` block or calling `cancel` stops the job after its current step.

    Attributes:
        value: what the job returned, once the stream has ended.
    """

    def __init__(self, job: _Job[T]) -> None:
        """Wrap a submitted job."""
        self._job = job
        self._is_done = False
        self.value: object = None

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
            self._is_done, self.value = True, item.value
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

    def __init__(
        self, name: str = "kvrag", *, server: Server | None = None, max_running: int | None = None
    ) -> None:
        """Make an idle worker.

        Args:
            name: of the thread.
            server: does what jobs ask for; without one they must not ask.
            max_running: most jobs of the line that run at a time; None: all.
        """
        self._name, self._server, self._max_running = name, server, max_running
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, make: Callable[[], Iterator[T | Ask]], *, in_line: bool = False) -> Stream[T]:
        """Run a generator on the worker's thread.

        Args:
            make: called on that thread; every value it yields reaches the stream.
            in_line: begin only when fewer than `max_running` such jobs run; first come, first served.

        Raises:
            EngineClosed: the worker was closed.
        """
        job = _Job(make, in_line=in_line)
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

    def do(self, make: Callable[[], Generator[Ask, Any, T]]) -> T:
        """The same for work that leaves the others their turns: what the generator returns.

        Raises:
            EngineClosed: the worker was closed, before or meanwhile.
        """
        if threading.current_thread() is self._thread:
            return self._at_once(make())
        stream: Stream[object] = self.submit(make)
        for _ in stream:
            pass
        return cast("T", stream.value)

    def _at_once(self, work: Generator[Ask, Any, T]) -> T:
        """Without leaving this thread, which nobody else can have meanwhile."""
        outcome: Any = None
        try:
            while True:
                ask = work.send(outcome)
                outcome = None
                if ask is not PAUSE and self._server is not None:
                    (outcome,) = self._server.run([ask])
        except StopIteration as end:
            done: T = end.value
            return done

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """End the thread and wait for it; whoever waits for a result gets `EngineClosed`."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._jobs.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        schedule = _Schedule(self._server, self._max_running)
        with torch.inference_mode():
            while True:
                while schedule.is_idle or not self._jobs.empty():
                    job = self._jobs.get()
                    if job is None:
                        self._end(schedule)
                        return
                    schedule.add(job)
                    del job  # while we wait for the next one, this one's memory is free
                schedule.turn()

    def _end(self, schedule: _Schedule) -> None:
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                schedule.add(job)
        schedule.abandon()


class _Schedule:
    """Who runs, who waits in line, and whose turn it is."""

    def __init__(self, server: Server | None, max_running: int | None) -> None:
        self._server, self._max_running = server, max_running
        self._running: list[_Job[object]] = []
        self._asking: list[_Job[object]] = []  # who asked first comes first
        self._line: deque[_Job[object]] = deque()

    @property
    def is_idle(self) -> bool:
        """There is nothing to do."""
        return not (self._running or self._line)

    def add(self, job: _Job[object]) -> None:
        """Take a new job."""
        (self._line if job.in_line else self._running).append(job)

    def turn(self) -> None:
        """One step of every job, and one of what they ask for."""
        self._line = deque(job for job in self._line if not job.stop_if_cancelled())
        self._admit()
        self._running = [job for job in self._running if self._goes_on(job)]
        if self._asking:
            self._serve()

    def _goes_on(self, job: _Job[object]) -> bool:
        """Let a job do its step, unless it waits for an outcome."""
        if job.ask is not None:
            return not job.stop_if_cancelled()
        goes_on = job.step()
        if job.ask is not None:
            self._asking.append(job)
        return goes_on

    def _admit(self) -> None:
        """Let jobs of the line begin."""
        num = sum(job.in_line for job in self._running)
        while self._line and (self._max_running is None or num < self._max_running):
            self._running.append(self._line.popleft())
            num += 1

    def _serve(self) -> None:
        assert self._server is not None
        self._asking = [job for job in self._asking if job.ask is not None]  # some were cancelled
        asks = [job.ask for job in self._asking]
        if not asks:
            return
        numbers = self._server.choose(asks)
        try:
            outcomes = self._server.run([asks[i] for i in numbers])
        except Exception as error:  # must not end the thread
            outcomes = [error] * len(numbers)
        for i, outcome in zip(numbers, outcomes, strict=True):
            self._asking[i].take(outcome)
        self._asking = [job for job in self._asking if job.ask is not None]

    def abandon(self) -> None:
        """Stop everything for good."""
        for job in [*self._running, *self._line]:
            job.abandon()
