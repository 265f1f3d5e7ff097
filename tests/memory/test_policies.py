"""Policies by name; budgets in tokens and in bytes."""

from __future__ import annotations

from typing import Any

import pytest

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.policies import POLICIES, memory_policy, tokens_of
from kvrag.memory.salient import Salient
from kvrag.memory.window import Window


@pytest.mark.parametrize(
    ("policy", "name", "settings"),
    [
        (Full(), "full", {}),
        (Window(64), "window", {}),
        (Cascade(64, sub_caches=2, beta=0.5), "cascade", {"sub_caches": 2, "beta": 0.5}),
        (Ladder(64, 3, overlap=1), "ladder", {"span": 3, "overlap": 1}),
        (LadderCascade(64, bonus=0.25), "combined", {"bonus": 0.25}),
        (Salient(64, recent=0.25), "salient", {"recent": 0.25}),
    ],
)
def test_policies_by_name(policy: MemoryPolicy, name: str, settings: dict[str, Any]) -> None:
    assert policy.name == name
    assert memory_policy(name, policy.budget, **settings) == policy
    assert set(POLICIES) == {"full", "window", "cascade", "ladder", "combined", "salient"}


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [(4096, 4096), ("4097", 4097), ("512MB", 5000), ("512 mb", 5000), ("1.5GiB", 15728), ("204800B", 2)],
)
def test_budgets(budget: int | str, tokens: int) -> None:
    assert tokens_of(budget, 102_400) == tokens
    assert memory_policy("window", budget, bytes_per_token=102_400, sinks=0).budget == tokens


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("casade", {"budget": 9}, "full, window, cascade"),
        ("cascade", {}, "needs a budget"),
        ("cascade", {"budget": "many"}, "tokens such as 4096"),
        ("cascade", {"budget": "4K"}, "tokens such as 4096"),
        ("cascade", {"budget": "512MB"}, "bytes per token"),
        ("cascade", {"budget": "512MB", "bytes_per_token": 0}, "bytes per token"),
        ("cascade", {"budget": "5KB", "bytes_per_token": 6000}, "less than one token"),
        ("cascade", {"budget": -3}, "less than one token"),
        ("cascade", {"budget": 99, "span": 2}, "no setting 'span'"),
        ("window", {"budget": 3}, "need 5"),
        ("full", {"budget": 3}, "no budget"),
        ("ladder", {"budget": 99}, "needs the setting 'span'"),
    ],
)
def test_what_cannot_work_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_policy(name, **arguments)
