"""Which documents are dropped, and before which layers, while the question is read (CacheFocus, sec. 3).

Lee, Park, Han, Na, "CacheFocus: Dynamic Cache Re-Positioning for Efficient Retrieval-Augmented Generation",
arXiv:2502.11101. The unit is a whole document, never a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvrag.errors import ConfigError
from kvrag.focus.heats import Heats
from kvrag.focus.scoring import AttentionScore, GivenScore, NearScore, RandomScore, RankScore, Scorer
from kvrag.focus.together import Together, check

__all__ = ["AttentionScore", "GivenScore", "NearScore", "Pruning", "RandomScore", "RankScore", "Scorer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """A schedule: how many documents are left from which layer on.

    Attributes:
        keep: documents left at the end: a number, or a share of them (rounded up, at least one).
        start: first layer before which documents are dropped; None: a quarter of the layers, at least 1.
        every: layers from one prune to the next.
        drop: documents dropped at once; None: as many as reach `keep` in the last prune.
        below: drop what scores below this share of the best score instead, never fewer left than `keep`.
        scorer: what decides; the lowest running score goes first, at equal scores the later document.
        nearness: how much the similarity that the retriever saw counts beside it, see `NearScore`; 0: not at
            all. It is known where kvrag itself searches (`kvrag.ask`, `kvrag ask`), or given by `nearer`;
            elsewhere it is an error.
        heats: what happens before where documents do not fit into the window; None: they share positions.
        together: chunks of one source are kept or dropped together, by the "sum" of their scores or the
            "max"; `keep` and `drop` then count sources. None: each on its own.
    """

    keep: int | float = 0.5
    start: int | None = None
    every: int = 1
    drop: int | None = None
    below: float | None = None
    scorer: Scorer = field(default_factory=AttentionScore)
    nearness: float = 0.0
    heats: Heats | None = None
    together: Together | None = None

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: expected a share above 0 up to 1, or a number of documents")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ConfigError(f"keep={self.keep}: expected at least 1 document")
        if self.every < 1 or (self.drop is not None and self.drop < 1):
            raise ConfigError(f"every={self.every}, drop={self.drop}: expected at least 1")
        if self.start is not None and self.start < 1:
            raise ConfigError(f"start={self.start}: the first layer has to attend before there are scores")
        if not self.nearness >= 0:
            raise ConfigError(f"nearness={self.nearness}: expected 0 or more")
        check(self.together)
        if self.below is not None and not 0 < self.below <= 1:
            raise ConfigError(f"below={self.below}: expected a share of the best score, above 0 up to 1")

    def nearer(self, similarities: Sequence[float]) -> Pruning:
        """The same for documents, in retrieval order, that the retriever found so similar to the question."""
        if not self.nearness:
            return self
        scorer = NearScore(tuple(similarities), self.nearness, self.scorer)
        return replace(self, scorer=scorer, nearness=0.0)

    def num_kept(self, num_documents: int) -> int:
        """Documents left at the end."""
        kept = math.ceil(self.keep * num_documents) if isinstance(self.keep, float) else self.keep
        return min(num_documents, max(1, kept))

    def prunes_before(self, layer: int, num_layers: int) -> bool:
        """Whether documents may be dropped before layer `layer`."""
        start = self.first(num_layers)
        return start <= layer < num_layers and (layer - start) % self.every == 0

    def dropped(
        self, layer: int, num_layers: int, survivors: Sequence[int], scores: Sequence[float], total: int
    ) -> list[int]:
        """Documents that go before layer `layer`.

        Args:
            layer: about to attend.
            num_layers: of the model.
            survivors: documents so far, ascending.
            scores: running score of every document, by number.
            total: documents at the beginning.
        """
        if not self.prunes_before(layer, num_layers):
            return []
        keep = self.num_kept(total)
        surplus = len(survivors) - keep
        if surplus <= 0:
            return []
        worst_first = sorted(survivors, key=lambda i: (scores[i], -i))
        if self.below is not None:
            border = self.below * max(scores[i] for i in survivors)
            return [i for i in worst_first[:surplus] if scores[i] < border]
        prunes_left = len(range(layer, num_layers, self.every))
        return worst_first[: min(surplus, self.drop or math.ceil(surplus / prunes_left))]

    def first(self, num_layers: int) -> int:
        """First layer before which documents may be dropped."""
        return max(1, num_layers // 4) if self.start is None else self.start
