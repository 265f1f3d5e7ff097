"""Policies that `benchmarks/quality.py` compares, by name and family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from kvrag.focus import policy as presets
from kvrag.focus.heats import Heats
from kvrag.focus.placement import Placement
from kvrag.focus.policy import Policy, SecondLook
from kvrag.focus.pruning import AttentionScore, GivenScore, Pruning, RandomScore, RankScore, Scorer
from kvrag.focus.repair import Deviation, FirstRows, QueryDriven
from kvrag.focus.together import Together
from kvrag_kernels import Group

FULL, TRUNCATED, PLAIN = "full attention", "full, truncated", "re-positioning"
KEEPS = (1, 2, 0.5)
HEATS = Heats()
TOGETHER: Together = "max"
IN_HEATS = "keep 2 documents, best layer, heats"
NEAR = "best layer x similarity, heats"

# What plots and claims rest on.
CORE = frozenset(
    {
        *(PLAIN, "naive", "PCW", "APE .9/.9"),
        *("keep .5, sort", "keep .5, random", "keep .5, rank"),
        *("keep 2, best layer", "keep 2, best layer, heats", NEAR, "keep 2, similarity"),
        *("encoded behind parts before", f"parts before + {IN_HEATS}"),
    }
)
# The same over few documents; reading rows of many documents again takes most of the time.
CORE_REPAIRS = frozenset({"EPIC 16", "query-driven .15, best layers", "parts before + query-driven"})


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of a question beside its words.

    Attributes:
        truth: for each unit, 1 if the answer needs it; for controls, and nobody else.
        seed: another one for every question; for controls.
        near: for each unit, its similarity to the question, as a retriever sees it.
    """

    truth: tuple[float, ...]
    seed: int
    near: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the comparison.

    Attributes:
        name: in tables.
        family: rows that belong together.
        make: the policy for one question.
        least: fewest documents for which it is worth asking.
        decoded: its answer depends on its own tokens, so it has to be decoded.
        behind: what units are encoded behind, beside the prefix: nothing, the parts "before" them in their
            document, or the two most "similar" units of the context (FusionRAG).
    """

    name: str
    family: str
    make: Callable[[Hint], Policy]
    least: int = 1
    decoded: bool = False
    behind: Literal["", "before", "similar"] = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """Which layers' attention is worth counting, as measured on a sample.

    Attributes:
        single: for pruning, one layer.
        pair: for pruning, two layers.
        columns: for repair, one layer or two.
        looked_by: for repair, whose attention.
    """

    single: AttentionScore
    pair: AttentionScore
    columns: tuple[int, ...]
    looked_by: Literal["question", "last"] = "question"


def entries(scores: Scores, window: int) -> list[Entry]:
    """All rows but full attention.

    Args:
        scores: see there.
        window: positions the model was trained for.
    """
    made = [*_layouts(), *_pruned(), *_controls(), *_best(scores), *_second(), *_repairs(scores)]
    made += _offline(scores)
    return [replace(entry, make=_within(entry.make, window)) for entry in made]


def _within(make: Callable[[Hint], Policy], window: int) -> Callable[[Hint], Policy]:
    def made(hint: Hint) -> Policy:
        policy = make(hint)
        return replace(policy, placement=replace(policy.placement, window=window))

    return made


def _fixed(name: str, family: str, policy: Policy, *, least: int = 1, decoded: bool = False) -> Entry:
    return Entry(name, family, lambda _: policy, least, decoded)


def _layouts() -> list[Entry]:
    beyond = ("round_robin", "interpolate", "extrapolate", "truncate")
    return [
        _fixed(PLAIN, "placement", presets.PLAIN),
        _fixed("naive", "placement", presets.naive()),
        _fixed("PCW", "placement", presets.pcw()),
        _fixed("APE .9/.9", "placement", presets.ape()),
        _fixed("APE 1/.95", "placement", replace(presets.pcw(), name="ape", group=Group(1.0, 0.95))),
        *(_fixed(name, "beyond", Policy(placement=Placement(beyond=name)), least=20) for name in beyond),
    ]


def _pruning(
    keep: float,
    order: str,
    scorer: Scorer,
    start: int | None = None,
    *,
    heats: Heats | None = None,
    together: Together | None = None,
) -> Policy:
    pruning = Pruning(keep=keep, scorer=scorer, start=start, heats=heats, together=together)
    return Policy(name="cachefocus", placement=Placement(order=order), pruning=pruning)


def _pruned() -> list[Entry]:
    return [
        _fixed(f"keep {_short(keep)}, {order}", "pruning", _pruning(keep, order, AttentionScore()), least=2)
        for keep in KEEPS
        for order in ("keep", "align", "sort")
    ]


def _controls() -> list[Entry]:
    made: list[Entry] = []
    for keep in KEEPS[1:]:
        by: dict[str, Callable[[Hint], Scorer]] = {
            "random": lambda hint: RandomScore(hint.seed),
            "rank": lambda _: RankScore(),
            "similarity": lambda hint: GivenScore(hint.near),
            "oracle": lambda hint: GivenScore(hint.truth),
        }
        made += [
            Entry(
                f"keep {_short(keep)}, {name}",
                "control",
                lambda hint, scorer=scorer, keep=keep: _pruning(keep, "sort", scorer(hint)),
                least=2,
            )
            for name, scorer in by.items()
        ]
    return made


def _from(score: AttentionScore) -> int:
    """First layer before which documents can be dropped: before, all scores are zero."""
    return max(score.layers or (0,)) + 1


def _best(scores: Scores) -> list[Entry]:
    made = [("best layer", scores.single, keep) for keep in KEEPS] + [
        ("best pair", scores.pair, keep) for keep in KEEPS[1:]
    ]
    return [
        *(
            _fixed(
                f"keep {_short(keep)}, {name}",
                "best layers",
                _pruning(keep, "sort", score, _from(score)),
                least=2,
            )
            for name, score, keep in made
        ),
        *(_fixed(name, "best layers", policy, least=2) for name, policy in _whole(scores).items()),
        Entry(NEAR, "best layers", lambda hint: _near(scores.single, hint), least=2),
    ]


def _near(score: AttentionScore, hint: Hint) -> Policy:
    """One document, and those that come near it; two of each heat go on."""
    pruning = Pruning(
        keep=1, below=0.5, scorer=score, nearness=4.0, start=_from(score), heats=Heats(winners=2)
    )
    return Policy(name="cachefocus", placement=Placement(order="sort"), pruning=pruning.nearer(hint.near))


def _whole(scores: Scores) -> dict[str, Policy]:
    """Ours: in heats beyond the window, and with the parts of a document kept together."""
    best = _pruning(2, "sort", scores.single, _from(scores.single), heats=HEATS)
    documents = _pruning(2, "sort", scores.single, _from(scores.single), together=TOGETHER)
    both = _pruning(2, "sort", scores.single, _from(scores.single), heats=HEATS, together=TOGETHER)
    return {
        "keep 2, best layer, heats": best,
        "keep 2 documents, best layer": documents,
        IN_HEATS: both,
    }


def _second() -> list[Entry]:
    # The layers that are best for a question's rows are not those for an answer's: all count here.
    looks = {
        "second look, keep .5": SecondLook(keep=0.5),
        "second look, keep 2, squared": SecondLook(keep=2, scorer=AttentionScore(squared=True)),
    }
    return [
        _fixed(name, "second look", Policy(name="second look", second_look=second), least=2, decoded=True)
        for name, second in looks.items()
    ]


def _repairs(scores: Scores) -> list[Entry]:
    best = QueryDriven(layers=scores.columns, looked_by=scores.looked_by)
    sort, focused = _pruning(0.5, "sort", AttentionScore()), scores.single
    repaired = {
        "EPIC 4": Policy(name="epic", repair=FirstRows(4)),
        "EPIC 16": Policy(name="epic", repair=FirstRows(16)),
        "CacheBlend .15": Policy(name="cacheblend", repair=Deviation()),
        "query-driven .15": Policy(name="query-driven", repair=QueryDriven()),
        "query-driven .15, best layers": Policy(name="query-driven", repair=best),
        "keep .5, sort + query-driven": replace(sort, repair=QueryDriven()),
        "keep .5, best layers + query-driven": replace(
            _pruning(0.5, "sort", focused, _from(focused)), repair=best
        ),
    }
    # One unit has nothing before it; a document of two parts has.
    return [_fixed(name, "repair", policy) for name, policy in repaired.items()]


def _offline(scores: Scores) -> list[Entry]:
    best = QueryDriven(layers=scores.columns, looked_by=scores.looked_by)
    repaired = Policy(name="query-driven", repair=best)
    return [
        *(
            Entry(f"encoded behind {name}", "offline", lambda _: presets.PLAIN, behind=behind)
            for name, behind in _BEHIND.items()
        ),
        Entry("parts before + query-driven", "offline", lambda _: repaired, behind="before"),
        Entry(
            f"parts before + {IN_HEATS}", "offline", lambda _: _whole(scores)[IN_HEATS], 2, behind="before"
        ),
    ]


_BEHIND: dict[str, Literal["before", "similar"]] = {"parts before": "before", "2 similar": "similar"}


def _short(keep: float) -> str:
    return f"{keep:g}".replace("0.", ".")
