"""Cascades that were recorded from the published code: kept tokens, slots, positions, scores, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvrag.memory.base import MemoryState
from kvrag.memory.cascade import Cascade, CascadeState
from kvrag.memory.window import Window
from kvrag.testing.memories import static_seen

Cases = list[dict[str, Any]]
Golden = Callable[[str], Cases]
FILES = {"cascade_policy": 7, "cascade_tiny": 5, "cascade_single_equals_streaming": 3}


def _policy(config: dict[str, Any], **changes: Any) -> Cascade:
    return Cascade(
        config["window"] * config["sub_caches"] + config["sinks"],
        sub_caches=config["sub_caches"],
        sinks=config["sinks"],
        schedule=tuple(config["accept_every"]) if "accept_every" in config else "pow2",
        **changes,
    )


def _levels(state: MemoryState, head: int, config: dict[str, Any]) -> dict[str, Any]:
    """Sinks, tokens by sub-cache and their ranks, as the recordings have them."""
    width, sinks = config["window"], config["sinks"]
    found: dict[str, Any] = {
        "sinks": [],
        **{k: [[] for _ in range(config["sub_caches"])] for k in ("sub", "pos")},
    }
    for run in state.runs:
        for i in range(run.length):
            slot, token = run.slot + i, int(state.ids[0, head, run.slot + i])
            if slot < sinks:
                assert run.rank + i == len(found["sinks"])
                found["sinks"].append(token)
            else:
                found["sub"][(slot - sinks) // width].append(token)
                found["pos"][(slot - sinks) // width].append(run.rank + i)
    return found


def _slots(state: MemoryState, head: int, config: dict[str, Any]) -> list[int | None]:
    ids: list[int] = state.ids[0, head, config["sinks"] :].tolist()
    return [None if token < 0 else token for token in ids]


def _take(state: CascadeState, scores: torch.Tensor, num_new: int) -> None:
    fresh = scores[:, state.seen : state.seen + num_new]
    state.take(num_new, static_seen(state, fresh[None]) if state.watching else None)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["one by one", "between recordings"])
def test_recorded_policies(name: str, is_chunked: bool, golden: Golden) -> None:
    cases = golden(name)
    assert len(cases) == FILES[name]
    for case in cases:
        config, scores = case["config"], torch.tensor(case["scores"])
        policy = _policy(config, beta=1.0, eager=config["eager_fill"])
        assert policy.periods == tuple(config["accept_every"])
        state = policy.start(1, config["heads"])
        for step in case["steps"]:
            stride = step["n_seen"] - state.seen if is_chunked else 1
            while state.seen < step["n_seen"]:
                _take(state, scores, stride)
            for head, expected in enumerate(step["heads"]):
                mine = min(head, state.ids.shape[1] - 1)
                found = _levels(state, mine, config)
                assert found == {key: expected[key] for key in found}
                if "slots" in expected:
                    assert _slots(state, mine, config) == expected["slots"]
                    assert list(state.start) == expected["start"]
                    assert list(state.stored) == expected["stored"]


def test_named_schedules_are_the_recorded_ones(golden: Golden) -> None:
    for case in golden("cascade_policy"):
        config = case["config"]
        policy = Cascade(1000, sub_caches=config["sub_caches"], schedule=config["cascade_func"])
        assert policy.periods == tuple(config["accept_every"])


def test_one_sub_cache_is_the_recorded_window(golden: Golden) -> None:
    for case in golden("cascade_single_equals_streaming"):
        config = case["config"]
        state = Window(config["budget"], sinks=config["sinks"]).start(1, config["heads"])
        for kept in case["streaming_llm_kept"]:
            state.take(1)
            slots = [slot for run in state.runs for slot in range(run.slot, run.slot + run.length)]
            assert state.ids[0, 0, slots].tolist() == kept


@pytest.mark.parametrize("number", range(3))
def test_recorded_attention(number: int, golden: Golden, plain_attention: Any) -> None:
    case = golden("cascade_attn_decode")[number]
    config = case["config"]
    heads, kv_heads, dim = config["H"], config["KVH"], config["D"]
    policy = _policy(
        config,
        beta=config["beta"],
        reduction=config["head_reduction"],
        homogeneous=config["homogeneous_heads"],
    )
    state = policy.start(1, kv_heads)
    attention = plain_attention(state, kv_heads, dim)
    rows = torch.tensor(case["x"]).view(-1, heads + 2 * kv_heads, dim).transpose(0, 1)
    assert rows.shape[1] == sum(config["chunks"])
    for step in case["steps"]:
        new = rows[:, state.seen : state.seen + step["n_new"]]
        out = attention.read(*new.split([heads, kv_heads, kv_heads]))
        assert state.seen == step["n_seen"]
        torch.testing.assert_close(out.flatten(), torch.tensor(step["out"]), rtol=1e-5, atol=1e-5)
        for head, expected in enumerate(step["heads"]):
            mine = min(head, state.ids.shape[1] - 1)
            found = _levels(state, mine, config)
            assert len(found["sinks"]) == step["n_sinks"]
            assert (found["sub"], found["pos"]) == (expected["sub"], expected["pos"])
            for tokens, scores in zip(expected["sub"], expected["score"], strict=True):
                slots = [state.ids[0, mine].tolist().index(token) for token in tokens]
                torch.testing.assert_close(
                    state.scores[0, mine, slots], torch.tensor(scores), rtol=1e-5, atol=1e-5
                )


EVENTS = {
    4: ([], [1, 2, 3, 4]),
    8: ([1, 2, 3, 4], [5, 6, 7, 8]),
    9: ([2, 3, 4, 5], [6, 7, 8, 9]),
    10: ([2, 3, 4, 5], [7, 8, 9, 10]),
    11: ([3, 4, 5, 7], [8, 9, 10, 11]),
    12: ([3, 4, 5, 7], [9, 10, 11, 12]),
    13: ([4, 5, 7, 9], [10, 11, 12, 13]),
    14: ([4, 5, 7, 10], [11, 12, 13, 14]),
    15: ([5, 7, 10, 11], [12, 13, 14, 15]),
    16: ([5, 7, 10, 12], [13, 14, 15, 16]),
    17: ([7, 10, 12, 13], [14, 15, 16, 17]),
    18: ([7, 10, 12, 14], [15, 16, 17, 18]),
    19: ([10, 12, 14, 15], [16, 17, 18, 19]),
    20: ([10, 12, 14, 15], [17, 18, 19, 20]),
}
DIGITS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]


def test_the_worked_example() -> None:
    config = {"window": 4, "sub_caches": 2, "sinks": 1}
    state = _policy(config, beta=1.0).start(1, 1)
    scores = torch.tensor([DIGITS]) / 16
    for token in range(21):
        _take(state, scores, 1)
        if token in EVENTS:
            assert _levels(state, 0, config)["sub"] == [*reversed(EVENTS[token])]
    assert _levels(state, 0, config)["pos"] == [[5, 6, 7, 8], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("scores", "survivors"),
    [
        ([1.0] * 21, [10, 12, 14, 16]),
        (list(range(21)), [10, 12, 14, 16]),
        (list(range(21, 0, -1)), [9, 11, 13, 15]),
    ],
    ids=["equal", "increasing", "decreasing"],
)
def test_the_worked_example_with_plain_scores(scores: list[float], survivors: list[int]) -> None:
    config = {"window": 4, "sub_caches": 2, "sinks": 1}
    state = _policy(config, beta=1.0).start(1, 1)
    _take(state, torch.tensor([scores]).float(), 21)
    assert _levels(state, 0, config)["sub"] == [[17, 18, 19, 20], survivors]
