"""One object that says how documents are placed, pruned, mended and looked at; its parts compose freely."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrag.errors import ConfigError
from kvrag.focus.heats import Heats
from kvrag.focus.placement import Placement
from kvrag.focus.pruning import AttentionScore, Pruning, Scorer
from kvrag.focus.repair import Deviation, FirstRows, QueryDriven, Repair
from kvrag.focus.together import Together, check
from kvrag_kernels import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """Documents are scored again by the first tokens of the answer, when the model knows what it looks for.

    These tokens read every document, those dropped while the question was read too; then the best stay.

    Attributes:
        after: tokens of the answer that score.
        keep: documents left then: a number, or a share of all.
        scorer: what decides.
        together: chunks of one source stay or go together, see `Pruning`.
    """

    after: int = 4
    keep: int | float = 0.5
    scorer: Scorer = field(default_factory=AttentionScore)
    together: Together | None = None

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check(self.together)
        if self.after < 1:
            raise ConfigError(f"after={self.after}: expected at least 1 token of the answer")
        Pruning(keep=self.keep)  # the same bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How an answer treats the documents of its prompt. The default reads all of them where they stand.

    Attributes:
        name: for reports.
        placement: positions, and what happens beyond the trained range.
        pruning: who is dropped while the question is read; None: nobody.
        second_look: whether the first tokens of the answer decide anew.
        group: temperature and scale of the attention to all documents together (APE); None: as to anything.
        repair: which rows of documents are read again; None: none.
        per_layer: decode with each layer's own positions from the reading of the question, instead of the
            last ones in all layers.
        max_risk: read the documents in full if the answer's risk is above (see `kvrag.focus.risk`); None:
            never.
        spans: also find the strongest place inside the best documents.
    """

    name: str = "plain"
    placement: Placement = field(default_factory=Placement)
    pruning: Pruning | None = None
    second_look: SecondLook | None = None
    group: Group | None = None
    repair: Repair | None = None
    per_layer: bool = False
    max_risk: float | None = None
    spans: bool = False


PLAIN = Policy()


def cachefocus(
    keep: int | float = 0.5,
    *,
    layers: tuple[int, ...] | None = None,
    repair: Repair | None = None,
    heats: Heats | None = None,
    together: Together | None = None,
) -> Policy:
    """Prune while the question is read, the survivors sorted towards the query (arXiv:2502.11101).

    Not the paper's: with `heats`, documents beyond the window are compared in groups first; with `together`,
    chunks of one source share their fate.
    """
    pruning = Pruning(keep=keep, scorer=AttentionScore(layers), heats=heats, together=together)
    return Policy(name="cachefocus", placement=Placement(order="sort"), pruning=pruning, repair=repair)


def naive() -> Policy:
    """Every document where it was encoded, all at one place: reuse without re-positioning, for comparison."""
    return Policy(name="naive", placement=Placement("native", beyond="extrapolate"))


def pcw() -> Policy:
    """Parallel context windows (arXiv:2212.10947): all at one place, the query behind the longest."""
    return Policy(name="pcw", placement=Placement("overlap"))


def ape(temperature: float = 0.9, scale: float = 0.9) -> Policy:
    """Adaptive parallel encoding (arXiv:2502.05431): PCW with temperature and scale on the documents."""
    return Policy(name="ape", placement=Placement("overlap"), group=Group(temperature, scale))


def epic(count: int = 16) -> Policy:
    """EPIC / LegoLink (arXiv:2410.15332): the first rows of each document are read again."""
    return Policy(name="epic", repair=FirstRows(count))


def cacheblend(share: float = 0.15) -> Policy:
    """CacheBlend (arXiv:2405.16444): the rows whose values change most are read again."""
    return Policy(name="cacheblend", repair=Deviation(share))


def query_driven(share: float = 0.15, *, layers: tuple[int, ...] | None = None) -> Policy:
    """FusionRAG's online part (arXiv:2601.12904): the rows the question looks at are read again."""
    return Policy(name="query-driven", repair=QueryDriven(share, layers))


PRESETS = {
    "plain": lambda: PLAIN,
    "cachefocus": cachefocus,
    "naive": naive,
    "pcw": pcw,
    "ape": ape,
    "epic": epic,
    "cacheblend": cacheblend,
    "query-driven": query_driven,
}


def preset(name: str) -> Policy:
    """A policy by name, with its default settings.

    Raises:
        ConfigError: no policy has this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no policy {name!r}; expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
