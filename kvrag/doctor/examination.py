"""The examination of a model, from proof to recommendation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from kvrag.doctor.exactness import Exactness, exactness
from kvrag.doctor.layers import LayerScores, layer_scores
from kvrag.doctor.policies import PolicyScore, Recommendation, compare, examined, recommend
from kvrag.doctor.speeds import SpeedReport, speeds_of
from kvrag.engine import Engine
from kvrag.model import Model
from kvrag.prompt import RagPrompt
from kvrag.rotary import LayerSpec
from kvrag.trial.choice import MAX_KL, check_max_kl
from kvrag.trial.codecs import CodecScore, CodecTrial, smallest
from kvrag.trial.prompts import Prepared, Prompts
from kvrag.trial.samples import TEXTS, Case, cases

Progress = Callable[[int, int], None]

# Counting which layer is right needs more questions than averaging does; each is read from caches only.
_PER_QUESTION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Exactness):
    """What was found out about a model.

    Attributes:
        model: its name.
        layers: kinds of layers and how many there are of each.
        questions: how many the policies answered; 0 if caches are not exact, or no two sample documents fit.
        documents: in each question's prompt, at most.
        full_seconds: to the first token of full attention, median.
        policies: what each costs and loses.
        layer_scores: which layers find the right document.
        recommended: the policy to take.
        codecs: what each loses, and how much it writes.
        codec: the one that writes least within the budget.
        max_kl: the budget.
        speeds: of disk, link and model here, and what they imply; None: not measured.
    """

    model: str
    layers: dict[str, int]
    questions: int = 0
    documents: int = 0
    full_seconds: float = 0.0
    policies: tuple[PolicyScore, ...] = ()
    layer_scores: LayerScores | None = None
    recommended: Recommendation | None = None
    codecs: tuple[CodecScore, ...] = ()
    codec: str | None = None
    max_kl: float = MAX_KL
    speeds: SpeedReport | None = None


def examine(
    engine: Engine, *, questions: int = 8, max_kl: float = MAX_KL, progress: Progress | None = None
) -> Report:
    """Run the proofs, then the measurements on sample documents, on the engine's thread.

    Speeds are those of `Engine.measure`, which keeps them beside the engine's store: answers that choose
    between loading and reading anew need not measure again.

    Args:
        engine: the model.
        questions: how many to ask under each policy; their number is what takes time.
        max_kl: what a codec may lose against raw rows, in nats.
        progress: called with (done, total).

    Raises:
        ConfigError: the budget is negative.
    """
    check_max_kl(max_kl)
    form = engine.encoder().prompt
    report = engine.call(
        lambda: _examine(engine.model, form, questions, max_kl, progress or (lambda *_: None))
    )
    return replace(report, speeds=speeds_of(engine, report.codecs)) if report.is_exact else report


def _examine(model: Model, form: RagPrompt, questions: int, max_kl: float, progress: Progress) -> Report:
    exact = exactness(model, form.prefix, TEXTS, cases("", 1)[0].question)
    proven = Report(
        model=model.name,
        layers=dict(Counter(_kind(spec) for spec in model.specs)),
        tolerance=exact.tolerance,
        full_error=exact.full_error,
        prefix_error=exact.prefix_error,
        moved_error=exact.moved_error,
    )
    prompts = Prompts(model, form)
    asked, looked_at = cases(model.name, questions), cases(model.name, _PER_QUESTION * questions, seed=1)
    if not exact.is_exact or not any(map(prompts.prepare, asked)):
        return proven
    steps = _Steps(progress, len(asked) + len(looked_at))
    found = layer_scores(model, steps.through(prompts, looked_at))
    tried = examined(model.num_layers, found.pruning if found else None)
    before, coding = steps.asked, CodecTrial(model)
    scores, seconds = compare(model, coding.through(steps.through(prompts, asked)), tried)
    codec = smallest(coding.scores, max_kl)
    return replace(
        proven,
        questions=steps.asked - before,
        documents=steps.most,
        full_seconds=seconds,
        policies=tuple(scores),
        layer_scores=found,
        recommended=recommend(scores),
        codecs=coding.scores,
        codec=codec.name if codec else None,
        max_kl=max_kl,
    )


class _Steps:
    """Prepares cases one after the other, and tells how far that has come.

    Attributes:
        asked: cases that could be prepared.
        most: documents in one of them.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.asked = self.most = 0

    def through(self, prompts: Prompts, asked: Iterable[Case]) -> Iterator[Prepared]:
        for case in asked:
            one = prompts.prepare(case)
            if one is not None:
                self.asked += 1
                self.most = max(self.most, len(one.arrangement.units))
                yield one
            self._done += 1
            self._progress(self._done, self._total)


def _kind(spec: LayerSpec) -> str:
    window = "full attention" if spec.window is None else f"window of {spec.window}"
    if spec.rotation is None:
        return f"no rotation, {window}"
    rotation = spec.rotation
    return f"rotation of {2 * len(rotation.frequencies)} dimensions ({rotation.layout}), {window}"
