"""Ladders and windows that were recorded from the published codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryState
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.slots import in_order, without
from kvrag.memory.window import Window

Golden = Callable[[str], list[dict[str, Any]]]
Ids = Callable[[MemoryState], list[list[list[int]]]]


def _policy(config: dict[str, Any], **changes: Any) -> Ladder:
    return Ladder(
        config["budget"], config["span"], overlap=config["overlap"], sinks=config["start"], **changes
    )


@pytest.mark.parametrize("is_chunked", [False, True], ids=["one by one", "between recordings"])
@pytest.mark.parametrize("number", range(5))
def test_recorded_ladders(number: int, is_chunked: bool, golden: Golden, ids_of: Ids) -> None:
    case = golden("lacache_decode")[number]
    config = case["config"]
    policy = _policy(config, overshoot=True)
    rungs = policy.rungs(config["layers"])
    assert (rungs.group, rungs.kept, rungs.removed) == (config["B"], config["A"], config["R"])
    state = policy.start(config["layers"], 2)
    assert state.capacity == config["budget"] + config["comp"]
    for step in case["steps"]:
        stride = step["n_seen"] - state.seen if is_chunked else 1
        while state.seen < step["n_seen"]:
            state.take(stride)
        assert ids_of(state) == [[layer] for layer in step["layers"]]
        (run,) = state.runs
        assert run.length == step["length"] == step["next_query_pos_longbench_loop"]
        if step["n_seen"] > config["budget"]:
            assert state.cursor == step["cursor"]


def test_what_the_published_ladder_fails_on(golden: Golden) -> None:
    cases = golden("lacache_invalid")
    assert len(cases) == 6
    for case in cases:
        if "ZeroDivision" in (case["official_raises"] or ""):
            with pytest.raises(ConfigError, match=r"removes nothing|less than the span"):
                _policy(case).start(case["layers"], 1)
            continue
        policy = _policy(case)
        state = policy.start(case["layers"], 1)
        state.take(case["prefill"])
        kept = in_order(state)
        assert (kept.diff(dim=-1) > 0).all()
        assert case["budget"] - policy.rungs(case["layers"]).removed < kept.shape[-1] <= case["budget"]


def test_a_budget_without_room_for_a_ladder_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 9"):
        Ladder(8, span=2).start(4, 1)
    assert Ladder(9, span=2).start(4, 1).capacity == 9


LAYERS_AFTER = {
    17: ([*range(5), 6, *range(7, 17)], [*range(4), 5, 6, *range(7, 17)]),
    24: (
        [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21, 22, 23],
        [*range(4), *range(5, 20, 2), *range(20, 24)],
    ),
    25: (
        [0, 1, 2, 3, 4, 8, 10, 12, 14, 16, 18, 20, *range(21, 25)],
        [*range(4), *range(7, 20, 2), *range(20, 25)],
    ),
    61: (
        [0, 1, 2, 3, 4, 36, 44, 48, 52, 54, *range(55, 61)],
        [0, 1, 2, 3, 35, 43, 47, 51, 53, *range(54, 61)],
    ),
}
CURSORS = {24: 12, 25: 5}


def test_the_worked_example(ids_of: Ids) -> None:
    state = Ladder(16, span=2).start(4, 1)
    for num_seen in range(1, 62):
        state.take(1)
        if num_seen in LAYERS_AFTER:
            even, odd = LAYERS_AFTER[num_seen]
            assert ids_of(state) == [[even], [odd], [even], [odd]]
        assert state.cursor == CURSORS.get(num_seen, state.cursor)


@pytest.mark.parametrize("number", range(3))
def test_recorded_windows(number: int, golden: Golden, ids_of: Ids) -> None:
    case = golden("streaming_llm")[number]
    state = Window(case["start"] + case["recent"], sinks=case["start"]).start(1, 1)
    for step in case["steps"]:
        assert len(ids_of(state)[0][0]) == step["query_pos"]
        state.take(1)
        assert ids_of(state) == [[step["kept"]]]


@pytest.mark.parametrize("number", [3, 4])
def test_recorded_windows_that_made_room(number: int, golden: Golden, ids_of: Ids) -> None:
    # The published code makes room before a chunk, ours after it: what is left of the old ones is the same.
    case = golden("streaming_llm")[number]
    state = Window(case["start"] + case["recent"], sinks=case["start"]).start(1, 1)
    for step in case["steps"]:
        chunk = range(state.seen, state.seen + step["num_coming"])
        state.take(step["num_coming"])
        kept = ids_of(state)[0][0]
        assert [token for token in kept if token not in chunk] == [
            token for token in step["kept_before_chunk"] if token not in chunk
        ]
        after = step["after_chunk"]
        assert kept == [*after[: case["start"]], *after[case["start"] :][-case["recent"] :]]


def test_recorded_ranges_that_were_taken_out(golden: Golden) -> None:
    case = golden("streaming_llm")[5]
    for step in case["steps"]:
        state = Full().start(1, 1)
        state.take(len(step["before"]))
        runs = without(state.runs, *step["range"])
        assert [r for run in runs for r in range(run.slot, run.slot + run.length)] == step["after"]
        assert [r for run in runs for r in range(run.rank, run.rank + run.length)] == [
            *range(len(step["after"]))
        ]
