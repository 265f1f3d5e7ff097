"""Every policy does what every policy must do."""

from __future__ import annotations

from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.window import Window
from kvrag.testing.memories import MemoryPolicyContract


class TestFull(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Full()


class TestWindow(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Window(37, sinks=3)


class TestWindowWithoutSinks(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Window(1, sinks=0)


class TestCascade(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Cascade(67, sub_caches=4, sinks=3)


class TestCascadeHomogeneous(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Cascade(30, sub_caches=3, schedule=(1, 3, 5), homogeneous=True, beta=0.9, reduction="mean")


class TestCascadeNotEager(MemoryPolicyContract):
    keeps_until = 12  # sinks and the first sub-cache: it chooses from then on

    def make_policy(self) -> MemoryPolicy:
        return Cascade(30, sub_caches=3, schedule="pow3", eager=False)


class TestCascadeOfOne(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Cascade(29, sub_caches=1)


class TestLadder(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Ladder(40, span=3)


class TestLadderSteep(MemoryPolicyContract):
    num_layers = 8

    def make_policy(self) -> MemoryPolicy:
        return Ladder(31, span=2, overlap=1, sinks=0)


class TestLadderConsecutive(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return Ladder(50, span=3, overlap=1, consecutive=True)


class TestCombined(MemoryPolicyContract):
    def make_policy(self) -> MemoryPolicy:
        return LadderCascade(44, sub_caches=4, bonus=3.0)
