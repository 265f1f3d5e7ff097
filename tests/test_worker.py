"""The worker's thread: results, errors and cancellation reach the right caller, and the thread lives on."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch

from kvrag.errors import EngineClosed, GenerationCancelled
from kvrag.worker import PAUSE, Ask, Stream, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test")
    yield made
    made.close()


class Counting:
    """A job that counts for ever, one number at a time, as often as the test lets it."""

    def __init__(self) -> None:
        self.steps = 0
        self.ended = threading.Event()
        self.allowed = threading.Semaphore(0)

    def __call__(self) -> Iterator[int]:
        try:
            for i in count():
                assert self.allowed.acquire(timeout=30)
                self.steps += 1
                yield i
        finally:
            self.ended.set()


class Ticking:
    """A job that counts for ever and never waits."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            yield from count()
        finally:
            self.ended.set()


def assert_alive(worker: Worker) -> None:
    assert worker.call(lambda: "alive") == "alive"


def test_results_come_in_order(worker: Worker) -> None:
    assert list(worker.submit(lambda: iter(range(5)))) == [0, 1, 2, 3, 4]


def test_a_stream_that_has_ended_stays_ended(worker: Worker) -> None:
    stream = worker.submit(lambda: iter([1]))
    assert list(stream) == [1]
    assert list(stream) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_errors_reach_the_caller_and_the_thread_lives_on(worker: Worker, error: BaseException) -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise error

    stream = worker.submit(fails)
    assert next(stream) == 1
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error
    assert list(stream) == []
    assert_alive(worker)


def test_an_error_before_the_first_result_reaches_the_caller(worker: Worker) -> None:
    def make() -> Iterator[int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        next(worker.submit(make))
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert_alive(worker)


def test_cancel_ends_the_job_at_its_next_step(worker: Worker) -> None:
    job = Counting()
    stream = worker.submit(job)
    job.allowed.release()
    assert next(stream) == 0
    stream.cancel()
    job.allowed.release()
    assert job.ended.wait(30)
    assert job.steps <= 2
    with pytest.raises(GenerationCancelled):
        for _ in stream:
            pass
    assert_alive(worker)


def test_cancel_wakes_who_waits(worker: Worker) -> None:
    """A caller in another thread than the one that made the stream, or stops it."""
    job = Counting()
    stream = worker.submit(job)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            for _ in stream:
                pass
        except GenerationCancelled as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    stream.cancel()
    job.allowed.release()
    reader.join(30)
    assert len(caught) == 1


def test_leaving_the_with_block_stops_the_job(worker: Worker) -> None:
    job = Ticking()
    with worker.submit(job) as stream:
        assert next(stream) == 0
    assert job.ended.wait(30)
    assert_alive(worker)


def test_dropping_the_stream_stops_the_job(worker: Worker) -> None:
    job = Ticking()
    for number in worker.submit(job):
        if number == 3:
            break
    gc.collect()
    assert job.ended.wait(30)
    assert_alive(worker)


def test_a_job_that_resists_its_end_does_not_take_the_thread_along(worker: Worker) -> None:
    def stubborn() -> Iterator[int]:
        try:
            yield from count()
        finally:
            raise ValueError("not yet")

    with worker.submit(stubborn) as stream:
        next(stream)
    with pytest.raises(GenerationCancelled):
        for _ in stream:
            pass
    assert_alive(worker)


def test_jobs_take_turns(worker: Worker) -> None:
    """A long answer does not hold up a short one that began later."""
    order: list[str] = []
    begin = threading.Event()

    def job(name: str, steps: int) -> Iterator[str]:
        assert begin.wait(30)
        for _ in range(steps):
            order.append(name)
            yield name

    streams = [worker.submit(lambda n=n, s=s: job(n, s)) for n, s in (("long", 9), ("short", 3))]  # type: ignore[misc]
    begin.set()
    for stream in streams:
        assert len(list(stream)) in (9, 3)
    assert order.index("short") <= 2
    assert "".join(o[0] for o in order[: order.index("short") + 6]).count("ls") >= 2
    assert order[-1] == "long"


# ---- asyncio


def test_waiting_does_not_block_the_event_loop(worker: Worker) -> None:
    """The job goes on only when the loop has ticked often enough in between."""
    ticks = 0
    job = Counting()

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1
            if ticks % 10 == 0:
                job.allowed.release()

    async def read() -> list[int]:
        ticking = asyncio.create_task(tick())
        numbers = []
        async for number in worker.submit(job):
            numbers.append(number)
            if number == 4:
                break
        ticking.cancel()
        return numbers

    assert asyncio.run(asyncio.wait_for(read(), 60)) == [0, 1, 2, 3, 4]
    assert ticks >= 50
    job.allowed.release()
    assert job.ended.wait(30)


def test_results_that_are_all_there_leave_the_loop_its_turns(worker: Worker) -> None:
    async def read() -> int:
        stream = worker.submit(lambda: iter(range(100)))
        worker.call(lambda: None)
        while stream._job.mailbox.qsize() < 101:
            await asyncio.sleep(0.001)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        assert [i async for i in stream] == list(range(100))
        ticking.cancel()
        return ticks

    assert asyncio.run(read()) >= 50


def test_breaking_out_of_async_for_stops_the_job(worker: Worker) -> None:
    job = Ticking()

    async def read() -> None:
        async for number in worker.submit(job):
            if number == 2:
                break
        while not job.ended.is_set():
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(read(), 60))
    assert_alive(worker)


def test_cancelling_the_task_stops_the_job(worker: Worker) -> None:
    job = Counting()

    async def read(stream: Stream[int]) -> None:
        async for _ in stream:
            pass

    async def main() -> None:
        task = asyncio.create_task(read(worker.submit(job)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    job.allowed.release()
    assert job.ended.wait(30)
    assert job.steps <= 1


def test_errors_reach_async_callers(worker: Worker) -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    async def read() -> list[int]:
        return [i async for i in worker.submit(fails)]

    with pytest.raises(ValueError, match="no"):
        asyncio.run(read())


def test_several_async_readers_at_once(worker: Worker) -> None:
    async def read(first: int) -> list[int]:
        return [i async for i in worker.submit(lambda: iter(range(first, first + 20)))]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read(100 * n) for n in range(5)))

    assert asyncio.run(main()) == [list(range(100 * n, 100 * n + 20)) for n in range(5)]


def test_a_loop_that_is_gone_does_not_disturb_the_worker(worker: Worker) -> None:
    job = Counting()
    stream = worker.submit(job)

    async def begin() -> None:
        stream._job.wake = lambda: loop.call_soon_threadsafe(print)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    job.allowed.release()
    assert next(stream) == 0
    stream.cancel()
    job.allowed.release()
    assert_alive(worker)


# ---- inference mode


def test_inference_mode_stays_on_the_thread(worker: Worker) -> None:
    def inside() -> Iterator[bool]:
        while True:
            yield torch.is_inference_mode_enabled()

    with worker.submit(inside) as stream:
        for i, is_inside in enumerate(stream):
            assert is_inside
            assert not torch.is_inference_mode_enabled()
            if i == 3:
                break
    weights = torch.ones(2, requires_grad=True)
    (weights * 2).sum().backward()
    assert weights.grad is not None


# ---- calls and the end


def test_a_call_from_the_thread_itself_runs_at_once(worker: Worker) -> None:
    assert worker.call(lambda: worker.call(threading.current_thread)) is worker.call(threading.current_thread)


def test_finished_jobs_are_forgotten(worker: Worker) -> None:
    class Request:
        pass

    request = Request()
    gone = weakref.ref(request)
    assert list(worker.submit(lambda request=request: iter([id(request)])))  # type: ignore[misc]
    assert_alive(worker)
    del request
    for _ in range(1000):
        gc.collect()
        if gone() is None:
            break
    assert gone() is None


def test_close_ends_everything() -> None:
    worker = Worker()
    running, waiting = Ticking(), Counting()
    streams = [worker.submit(running), worker.submit(waiting)]
    assert next(streams[0]) == 0
    thread = worker._thread
    waiting.allowed.release(2)
    worker.close()
    assert thread is not None
    assert not thread.is_alive()
    assert running.ended.is_set()
    for stream in streams:
        with pytest.raises(EngineClosed):
            for _ in stream:
                pass
    with pytest.raises(EngineClosed, match="create a new one"):
        worker.submit(running)
    with pytest.raises(EngineClosed):
        worker.call(lambda: None)
    worker.close()


def test_close_of_an_idle_worker_starts_no_thread() -> None:
    worker = Worker()
    worker.close()
    assert worker._thread is None
    with pytest.raises(EngineClosed):
        worker.call(lambda: None)


def test_close_from_the_thread_itself_does_not_wait_for_itself() -> None:
    worker = Worker()
    worker.call(worker.close)
    thread = worker._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()


def test_who_submits_while_another_closes_never_waits_for_ever() -> None:
    for _ in range(20):
        worker = Worker()
        outcomes: list[object] = []

        def submit(worker: Worker = worker, outcomes: list[object] = outcomes) -> None:
            for i in range(50):
                try:
                    outcomes.append(worker.call(lambda i=i: i))  # type: ignore[misc]
                except EngineClosed as error:
                    outcomes.append(error)

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        worker.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert len(outcomes) == 150


# ---- what jobs ask for


class Number(Ask):
    """Asks for its double."""

    def __init__(self, value: int) -> None:
        self.value = value


class Doubling:
    """Doubles at most a few numbers at a time, refuses negative ones, and remembers what it did together."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.turns: list[list[int]] = []
        self.allowed, self.started = threading.Event(), threading.Event()
        self.allowed.set()

    def choose(self, asks: Sequence[Number]) -> list[int]:
        return list(range(len(asks)))[: self.most]

    def run(self, asks: Sequence[Number]) -> list[int | Exception]:
        self.started.set()
        assert self.allowed.wait(30)
        self.turns.append([ask.value for ask in asks])
        if any(ask.value > 10_000 for ask in asks):
            raise OverflowError("too large for any")
        return [ValueError("negative") if ask.value < 0 else 2 * ask.value for ask in asks]


def asking(*values: int) -> Generator[Ask | int, int, str]:
    """Gives the double of each value."""
    for value in values:
        yield (yield Number(value))
        yield PAUSE
    return f"{len(values)} values"


@pytest.fixture
def server() -> Doubling:
    return Doubling()


@pytest.fixture
def serving(server: Doubling) -> Iterator[Worker]:
    made = Worker("test", server=server, max_running=2)
    yield made
    made.close()


def submit_at_once(worker: Worker, *makes: Any, in_line: bool = False) -> list[Stream[Any]]:
    """Submit several jobs before any of them begins."""
    begin = threading.Event()
    blocker = worker.submit(lambda: iter([begin.wait(30)]))
    streams = [worker.submit(make, in_line=in_line) for make in makes]
    begin.set()
    assert next(blocker) is True
    return streams


def test_what_is_asked_is_done_together(serving: Worker, server: Doubling) -> None:
    jobs = [partial(asking, 1, 2, 3), partial(asking, 10), partial(asking, 100, 200)]
    streams = submit_at_once(serving, *jobs)
    assert [list(stream) for stream in streams] == [[2, 4, 6], [20], [200, 400]]
    assert [stream.value for stream in streams] == ["3 values", "1 values", "2 values"]
    assert server.turns[0] == [1, 10, 100]
    assert sorted(map(len, server.turns)) == [1, 2, 3]


def test_a_failed_outcome_is_raised_where_it_was_asked(serving: Worker) -> None:
    def careful() -> Generator[Ask | int, int, None]:
        try:
            yield (yield Number(-1))
        except ValueError:
            yield (yield Number(7))

    streams = submit_at_once(serving, careful, partial(asking, -1), partial(asking, 5, 6))
    assert list(streams[0]) == [14]
    with pytest.raises(ValueError, match="negative"):
        list(streams[1])
    assert list(streams[2]) == [10, 12]


def test_a_server_that_fails_does_not_take_the_thread_along(serving: Worker) -> None:
    for stream in submit_at_once(serving, partial(asking, 20_000), partial(asking, 1)):
        with pytest.raises(OverflowError, match="too large"):
            list(stream)
    assert list(serving.submit(partial(asking, 4))) == [8]


def test_who_waited_longest_has_the_next_turn() -> None:
    server = Doubling(most=1)
    worker = Worker("test", server=server)
    for stream in submit_at_once(
        worker, partial(asking, 1, 2, 3), partial(asking, 10, 20), partial(asking, 9)
    ):
        list(stream)
    worker.close()
    assert [n for (n,) in server.turns] == [1, 10, 9, 2, 20, 3]


def test_a_job_that_asks_and_others_take_turns(serving: Worker) -> None:
    """A plain job has one step while the others wait for what they asked."""
    order: list[str] = []

    def plain() -> Iterator[int]:
        for i in range(3):
            order.append("plain")
            yield i

    def asks() -> Generator[Ask | int, int, None]:
        for i in range(3):
            yield (yield Number(i))
            order.append("asking")

    for stream in submit_at_once(serving, plain, asks):
        assert len(list(stream)) == 3
    assert order == ["plain", "plain", "asking", "plain", "asking", "asking"]


def test_a_cancelled_job_is_not_done(serving: Worker, server: Doubling) -> None:
    ended = threading.Event()

    def cancelled() -> Generator[Ask | int, int, None]:
        try:
            while True:
                yield (yield Number(1))
        finally:
            ended.set()

    server.allowed.clear()
    streams: list[Stream[Any]] = [serving.submit(cancelled)]
    assert server.started.wait(30)
    streams += [serving.submit(partial(asking, *range(10, 20)))]
    streams[0].cancel()
    server.allowed.set()
    assert list(streams[1]) == [2 * i for i in range(10, 20)]
    assert ended.is_set()
    with pytest.raises(GenerationCancelled):
        list(streams[0])
    assert sum(1 in turn for turn in server.turns) == 1


def test_the_line_is_served_in_order_and_never_too_many_run(serving: Worker, server: Doubling) -> None:
    jobs = [partial(asking, *[10 * n] * (n + 1)) for n in range(5)]
    server.allowed.clear()
    streams = submit_at_once(serving, *jobs, in_line=True)
    streams[3].cancel()  # while it waits
    server.allowed.set()
    assert serving.call(lambda: "not in line") == "not in line"
    for n in (0, 1, 2, 4):
        assert list(streams[n]) == [20 * n] * (n + 1)
    with pytest.raises(GenerationCancelled):
        list(streams[3])
    assert max(map(len, server.turns)) == 2
    first = {n: next(i for i, turn in enumerate(server.turns) if 10 * n in turn) for n in (0, 1, 2, 4)}
    assert sorted(first, key=lambda n: first[n]) == [0, 1, 2, 4]
    assert not any(30 in turn for turn in server.turns)


def test_work_returns_what_it_made(serving: Worker, server: Doubling) -> None:
    def work() -> Generator[Ask, int, int]:
        yield PAUSE
        first = yield Number(4)
        yield PAUSE
        return first + (yield Number(5))

    def failing() -> Generator[Ask, int, int]:
        yield PAUSE
        raise ZeroDivisionError

    assert serving.do(work) == 18
    assert serving.call(lambda: serving.do(work)) == 18
    with pytest.raises(ZeroDivisionError):
        serving.do(failing)
    assert_alive(serving)


def test_close_ends_who_asks_and_who_waits_in_line(server: Doubling) -> None:
    worker = Worker("test", server=server, max_running=1)
    endless = partial(asking, *[0] * 100_000)
    streams = submit_at_once(worker, endless, endless, in_line=True)
    assert next(streams[0]) == 0
    worker.close()
    for stream in streams:
        with pytest.raises(EngineClosed):
            list(stream)
