"""The worker's thread: results, errors and cancellation reach the right caller, and the thread lives on."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from kvrag.errors import EngineClosed, GenerationCancelled
from kvrag.worker import Stream, Worker


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
