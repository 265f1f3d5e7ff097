"""What each policy loses against full attention, what it costs, and which one to take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from kvrag.focus import policy as policies
from kvrag.focus.policy import PLAIN, Policy
from kvrag.focus.pruning import Pruning
from kvrag.looking import look
from kvrag.model import Model
from kvrag.trial.divergence import divergence, logits_of
from kvrag.trial.prompts import Full, Prepared, full_attention

# What counts as good as the best. Below the floor, differences of KL are not worth any cost.
KL_FACTOR, KL_FLOOR, TOP1_MARGIN = 1.5, 0.01, 0.05

_CONTROLS = {"naive"}  # measured to compare with, never recommended


@dataclass(frozen=True, slots=True)
class PolicyScore:
    """One policy against full attention, means over questions and tokens of the answer.

    Attributes:
        name: of the policy.
        kl: KL divergence of its next-token distributions from those of full attention, in nats.
        top1: share of tokens for which both find the same one likeliest.
        recomputed: share of the documents' rows that are read again for an answer.
        kept: share of the documents' rows that the answer reads.
        seconds: to the first token, documents in memory, median.
    """

    name: str
    kl: float
    top1: float
    recomputed: float
    kept: float
    seconds: float

    @property
    def cost(self) -> tuple[float, float, float]:
        """What is compared to find the cheapest: counts, since times on small samples are mostly noise."""
        return (round(self.recomputed, 3), round(self.kept, 3), self.kl)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A policy to take.

    Attributes:
        policy: its name.
        why: one sentence.
    """

    policy: str
    why: str


def examined(num_layers: int, pruning: Pruning | None = None) -> list[Policy]:
    """The policies to compare.

    Args:
        num_layers: of the model.
        pruning: by the layers that find the right document; None: none does.
    """
    found = [PLAIN, policies.naive(), policies.pcw(), policies.ape(), policies.epic()]
    if num_layers > 1:  # values of the first layer never change
        found.append(policies.cacheblend())
    mended, pruned = policies.query_driven(), policies.cachefocus()
    found += [mended, pruned, replace(pruned, name="cachefocus+query-driven", repair=mended.repair)]
    if pruning is not None:
        found.append(replace(pruned, name="cachefocus, best layers", pruning=pruning))
    return found


def compare(
    model: Model, prepared: Iterable[Prepared], tried: Sequence[Policy]
) -> tuple[list[PolicyScore], float]:
    """Scores of the policies, and the median seconds of full attention to the first token."""
    found: list[list[PolicyScore]] = []
    seconds = []
    for one in prepared:
        full = full_attention(model, one.tokens)
        seconds.append(full.seconds)
        found.append([_score(model, one, full, policy) for policy in tried])
    return [_mean(column) for column in zip(*found, strict=True)], median(seconds)


def _score(model: Model, one: Prepared, full: Full, policy: Policy) -> PolicyScore:
    began = time.perf_counter()
    found = look(model, one.arrangement, policy, max_new_tokens=len(full.logits))
    int(found.read.logits[-1].argmax())  # a GPU is waited for here
    seconds = time.perf_counter() - began
    logits = logits_of(model, found, policy, full.answer)
    kept = set(found.focus.kept)
    rows = sum(unit.kv.num_tokens for unit in one.arrangement.units if unit.number in kept)
    return PolicyScore(
        policy.name,
        divergence(full.logits, logits),
        float((full.logits.argmax(-1) == logits.argmax(-1)).float().mean()),
        found.recomputed / one.num_rows,
        rows / one.num_rows,
        seconds,
    )


def _mean(column: Sequence[PolicyScore]) -> PolicyScore:
    return PolicyScore(
        column[0].name,
        fmean(s.kl for s in column),
        fmean(s.top1 for s in column),
        fmean(s.recomputed for s in column),
        fmean(s.kept for s in column),
        median(s.seconds for s in column),
    )


def recommend(scores: Sequence[PolicyScore]) -> Recommendation | None:
    """The cheapest policy that is about as good as the best; None without scores."""
    able = [s for s in scores if s.name not in _CONTROLS]
    if not able:
        return None
    kl, top1 = min(s.kl for s in able), max(s.top1 for s in able)
    border = max(KL_FACTOR * kl, kl + KL_FLOOR)
    close = [s for s in able if s.kl <= border]
    # Where one has the best KL and another the most agreement, KL decides.
    agreeing = [s for s in close if s.top1 >= top1 - TOP1_MARGIN]
    chosen = min(agreeing or close, key=lambda s: s.cost)
    agreement = (
        f" and at least {top1 - TOP1_MARGIN:.0%} the same tokens (best {top1:.0%})" if agreeing else ""
    )
    return Recommendation(
        chosen.name,
        f"the cheapest with a KL of at most {border:.3f} nats (best {kl:.3f}){agreement}: it reads "
        f"{chosen.recomputed:.0%} of the documents' rows again, and answers from {chosen.kept:.0%} of them.",
    )
