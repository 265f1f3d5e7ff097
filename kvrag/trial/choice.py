"""The codec that writes least of those that lose little enough: measured once for a model, and remembered."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvrag.errors import ConfigError
from kvrag.model import Model
from kvrag.prompt import RagPrompt
from kvrag.store.codec import CODECS
from kvrag.store.files import PARTIAL, commit, make_folder, write_partial
from kvrag.store.key import tagged_digest
from kvrag.trial.codecs import CodecScore, CodecTrial, smallest
from kvrag.trial.prompts import Prompts
from kvrag.trial.samples import Case, cases

logger = logging.getLogger(__name__)

FILE = "codecs.json"
AUTO = "auto"
MAX_KL = 0.01
"""What a codec may lose, in nats, unless somebody says otherwise."""
_QUESTIONS = 8
_VERSION = "1"  # of what is measured: another one is measured anew
_MAX_KEPT = 64


def check_max_kl(max_kl: float) -> None:
    """Refuse a budget that is none.

    Raises:
        ConfigError: negative, or not a number.
    """
    if not max_kl >= 0:
        raise ConfigError(f"max_kl={max_kl}: expected 0 nats or more")


def scores_on(model: Model, form: RagPrompt, asked: Sequence[Case]) -> tuple[int, tuple[CodecScore, ...]]:
    """Number of the prompts that fit the model's window, and what each codec loses on them."""
    prompts, trial = Prompts(model, form), CodecTrial(model)
    prepared = (one for case in asked if (one := prompts.prepare(case)) is not None)
    count = sum(1 for _ in trial.through(prepared))
    return count, trial.scores


def fitting_codec(model: Model, form: RagPrompt, max_kl: float, folder: Path | None) -> str:
    """Name of the smallest codec that loses at most so much on sample prompts, which may be "raw".

    All codecs are measured together, on the thread that owns the model, and the scores are kept in the
    store's folder: neither another start nor another budget measures again.

    Args:
        model: what reads the rows.
        form: of its prompts.
        max_kl: the budget in nats, mean over the tokens of answers.
        folder: of the store; None: there is none, and nothing is remembered.

    Raises:
        ConfigError: the budget is none, or nothing can be measured.
    """
    check_max_kl(max_kl)
    key = _key(model, form)
    scores = () if folder is None else _kept(folder / FILE, key)
    if not scores:
        _, scores = scores_on(model, form, cases(model.name, _QUESTIONS))
        if folder is not None and scores:
            _keep(folder / FILE, key, scores)
    best = smallest(scores, max_kl)
    if best is None:
        raise ConfigError(
            f"codec='auto': nothing can be measured on {model.name}, no two sample documents fit into its "
            f"window of {model.max_length} tokens; name a codec: {', '.join(CODECS)}"
        )
    _tell(best, scores, max_kl)
    return best.name


def _tell(best: CodecScore, scores: Sequence[CodecScore], max_kl: float) -> None:
    """Say what was chosen; loudly where nothing smaller than raw rows is good enough."""
    if best.name != "raw":
        logger.info("codec %s: loses %.2g nats of at most %g", best.name, best.kl, max_kl)
        return
    losses = ", ".join(f"{s.name} {s.kl:.2g}" for s in scores if s.name != "raw")
    logger.warning(
        "no codec that writes less than raw rows loses at most %g nats (%s): rows are kept as they are",
        max_kl,
        losses or "none can be used",
    )


# --- the file ---------------------------------------------------------------------------------------


def _key(model: Model, form: RagPrompt) -> str:
    """What scores depend on: the model's weights and element type, its prompts, and what is measured."""
    of_model = model.fingerprint()
    fields: dict[str, str | int | bytes] = {
        "version": _VERSION,
        "model": of_model.model,
        "tokenizer": of_model.tokenizer,
        "dtype": of_model.dtype,
        "form": repr(form),
        "window": model.max_length,
        "codecs": " ".join(CODECS),
    }
    return tagged_digest(fields)[:32]


def _kept(file: Path, key: str) -> tuple[CodecScore, ...]:
    """The scores of an earlier process; none if there are none that can be read."""
    try:
        found = tuple(
            CodecScore(str(s["name"]), float(s["bytes_per_token"]), float(s["kl"]), float(s["top1"]))
            for s in _read(file).get(key, ())
        )
    except (LookupError, TypeError, ValueError):
        return ()
    return found if {score.name for score in found} <= set(CODECS) else ()


def _keep(file: Path, key: str, scores: Sequence[CodecScore]) -> None:
    """Add scores to the file; a failure is only logged."""
    others = {name: raw for name, raw in _read(file).items() if name != key}
    kept = dict(list(others.items())[-(_MAX_KEPT - 1) :]) | {key: [asdict(score) for score in scores]}
    partial = file.with_name(f"codecs.{os.getpid()}{PARTIAL}")
    try:
        make_folder(file.parent)
        write_partial(partial, [json.dumps(kept, indent=1).encode()])
        commit(partial, file)
    except OSError as error:
        logger.warning("%s is not kept, and codecs are measured again next time: %s", file, error)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}
