"""A report as lines for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from kvrag.doctor.examination import Report
from kvrag.doctor.layers import LayerScores
from kvrag.doctor.speeds import describe_speeds
from kvrag.trial.prompts import CONTINUATION

_WIDTH = 80
_LAYERS_PER_LINE = 10


def describe(report: Report) -> str:
    """The report in words."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    verdict = "exact to rounding" if report.is_exact else "NOT exact: do not use this model"
    yield f"{report.model}: caches can be re-positioned, {verdict}"
    for kind, count in report.layers.items():
        yield f"  {count} layers: {kind}"
    yield f"largest relative difference of logits (allowed {report.tolerance:.0e})"
    yield f"  whole prompt read, against an ordinary forward pass    {report.full_error:.1e}"
    yield f"  one cached document, against an ordinary forward pass  {report.prefix_error:.1e}"
    yield f"  all segments moved along the positions, against none   {report.moved_error:.1e}"
    if report.policies:
        yield from _policies(report)
    elif report.is_exact:
        yield "policies were not compared: no two sample documents fit into the model's window"
    if report.layer_scores is not None:
        yield from _layers(report.layer_scores)
    if report.recommended is not None:
        yield f"recommended: {report.recommended.policy}"
        yield from textwrap.wrap(report.recommended.why, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    if report.codecs:
        yield from _codecs(report)
    if report.speeds is not None:
        yield from describe_speeds(report.speeds)


def _policies(report: Report) -> Iterator[str]:
    yield (
        f"against full attention ({report.questions} question{'' if report.questions == 1 else 's'} "
        f"over {report.documents} documents, "
        f"{CONTINUATION + 1} tokens each)"
    )
    yield f"  {'policy':<26}  {'KL, nats':>9}  {'same token':>10}  {'recomputed':>10}  {'first token':>11}"
    yield _row("full attention", f"{0:>9}", 1, 1, report.full_seconds)
    for score in report.policies:
        yield _row(score.name, f"{score.kl:>9.4f}", score.top1, score.recomputed, score.seconds)


def _codecs(report: Report) -> Iterator[str]:
    yield "codecs, against raw rows"
    yield f"  {'codec':<26}  {'KL, nats':>9}  {'same token':>10}  {'bytes per token':>15}"
    for score in report.codecs:
        yield f"  {score.name:<26}  {score.kl:>9.4f}  {score.top1:>10.0%}  {score.bytes_per_token:>15,.0f}"
    if report.codec is not None:
        yield f"smallest with a KL of at most {report.max_kl:g} nats: kvrag ingest --codec {report.codec}"


def _row(name: str, kl: str, top1: float, recomputed: float, seconds: float) -> str:
    return f"  {name:<26}  {kl}  {top1:>10.0%}  {recomputed:>10.0%}  {seconds * 1e3:>8.0f} ms"


def _layers(scores: LayerScores) -> Iterator[str]:
    yield (
        f"attention finds the document that answers ({scores.questions} questions, "
        f"chance {scores.chance:.0%})"
    )
    for title, precision in (("all its rows", scores.question), ("its last row", scores.last)):
        for start in range(0, len(precision), _LAYERS_PER_LINE):
            part = precision[start : start + _LAYERS_PER_LINE]
            label = f"layer {start}" if len(part) == 1 else f"layers {start} to {start + len(part) - 1}"
            yield f"  {'' if start else title:<13}{label:<14}" + "".join(f"{share:>5.0%}" for share in part)
    if not scores.best:
        yield "  no layer that pruning can use is better than chance: do not prune by attention"
        return
    which = f"layer{'s' if len(scores.best) > 1 else ''} {' and '.join(map(str, scores.best))}"
    rows = "the last row" if scores.best_rows == "last" else "all rows"
    start = max(scores.best) + 1
    yield f"  best: {rows} in {which} ({scores.best_precision:.0%}), so prune from layer {start} on:"
    layers = ",".join(map(str, scores.best))
    yield f"    kvrag ask --policy cachefocus --layers {layers} --rows {scores.best_rows}"
