import os
import threading
from functools import partial

import pytest

from kvrag.store.together import THREADS, together


def test_results_come_in_the_order_of_the_calls() -> None:
    assert together([partial(pow, n, 2) for n in range(50)]) == [n * n for n in range(50)]
    assert together([]) == []


def test_calls_run_side_by_side() -> None:
    meeting = threading.Barrier(THREADS, timeout=30)  # broken, and an error, unless all are inside at once
    assert len(set(together([meeting.wait] * THREADS))) == THREADS


def test_the_first_error_is_raised_when_all_calls_have_ended() -> None:
    ended = []

    def call(number: int) -> None:
        ended.append(number)
        if number in (3, 7):
            raise KeyboardInterrupt(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        together([partial(call, n) for n in range(10)])
    assert raised.value.args == (3,)
    assert sorted(ended) == list(range(10))


def test_calls_may_call_it_themselves() -> None:
    def depth(n: int) -> int:
        return 1 if n == 0 else sum(together([partial(depth, n - 1)] * 3))

    assert depth(5) == 3**5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    together([os.getpid] * THREADS)
    child = os.fork()
    if child == 0:
        meeting = threading.Barrier(THREADS, timeout=30)
        try:
            together([meeting.wait] * THREADS)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
