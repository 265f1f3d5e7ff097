"""How far the next tokens under one reading are from those under another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrag.attention import Looking
from kvrag.focus.policy import Policy
from kvrag.looking import Look
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.segments import SegmentTable


def logits_of(model: Model, found: Look, policy: Policy, answer: Sequence[int]) -> torch.Tensor:
    """[1 + len(answer), V], float32: next tokens behind the question and behind each token of the answer."""
    assert isinstance(found.tables, SegmentTable)  # no policy here decodes with tables of its own per layer
    behind = read(
        model,
        found.tables.seen_from(found.fresh.num_rows),
        answer,
        range(found.composed.end, found.composed.end + len(answer)),
        found.fresh,
        looking=Looking(policy.group) if policy.group else None,
        logits_to_keep=0,
    )
    return torch.cat((found.read.logits[-1:], behind.logits)).float()


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """KL divergence of `other` from `full` in nats, both [n, V] logits, mean over rows."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))  # rounding can leave equals below zero
