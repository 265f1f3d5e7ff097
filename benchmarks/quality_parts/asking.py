"""Asks one question in every way that `benchmarks/quality.py` compares, and checks the answers.

Greedy decoding gives an answer exactly if the likeliest token at every place of it is its next one, end mark
included. That is checked in one forward pass, without decoding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from quality_parts.contexts import Asked, Context, Form
from quality_parts.policies import FULL, PLAIN, TRUNCATED, Entry, Hint
from quality_parts.together import Every, Known, Sharing, together
from transformers import DynamicCache

from kvrag.answer import Answer
from kvrag.attention import Looking
from kvrag.caches import Caches
from kvrag.compose import Arrangement, compose
from kvrag.config import Sampling
from kvrag.embedding import HashedEmbedding
from kvrag.focus.policy import Policy
from kvrag.looking import Look, looking
from kvrag.model import Model
from kvrag.prefill import Want, Work, alone
from kvrag.query import Request, answer
from kvrag.segments import KV
from kvrag.store.memory import MemoryStore
from kvrag.text import joined_tokens

# Positions that are left for an answer where documents have to share; comparisons are the longest.
ROOM = 48
VARIANTS = ("mass", "mass, last row", "squared", "squared, last row")


@dataclass(frozen=True, slots=True)
class Result:
    """One answer.

    Attributes:
        right: it is the right one, to the token.
        same: it is the one of full attention.
        seconds: until the first token was chosen, documents' rows in memory; None: others were answered in
            the same passes.
        recomputed: rows of documents that were read again.
    """

    right: bool
    same: bool
    seconds: float | None
    recomputed: int = 0

    def packed(self) -> list[Any]:
        """As it is written to the records."""
        time_ms = None if self.seconds is None else round(self.seconds * 1e3, 2)
        return [int(self.right), int(self.same), time_ms, self.recomputed]


class Stock:
    """The same weights with transformers' own attention: an ordinary forward pass over everything."""

    def __init__(self, model: Model) -> None:
        """Copy the network; the original goes on reading segment tables."""
        self.network: Any = copy.deepcopy(model.network)
        self.network.set_attn_implementation("sdpa")
        self.device = model.device

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> tuple[DynamicCache, float]:
        """Prefill; gives the cache and the seconds it took."""
        start, cache = time.perf_counter(), DynamicCache()
        self._logits(tokens, cache, keep=1)
        return cache, time.perf_counter() - start

    @torch.inference_mode()
    def ask(
        self, cache: DynamicCache, question: Sequence[int], right: Sequence[int]
    ) -> tuple[tuple[int, ...], float]:
        """The greedy answer and the seconds to its first token; leaves the cache as it was."""
        before, start = cache.get_seq_length(), time.perf_counter()
        first = int(self._logits(question, cache, keep=1)[-1].argmax())
        seconds = time.perf_counter() - start
        tokens = self._greedy(cache, first, right)
        cache.crop(before - cache.get_seq_length())
        return tokens, seconds

    def _greedy(self, cache: DynamicCache, first: int, right: Sequence[int]) -> tuple[int, ...]:
        """Decode, in one pass as far as the answer is the right one."""
        found = [first]
        if first == right[0] and len(right) > 1:
            guessed = self._logits(right[:-1], cache).argmax(-1).tolist()
            good = next((i for i, (g, r) in enumerate(zip(guessed, right[1:], strict=True)) if g != r), None)
            if good is None:
                return tuple(right)
            found = [*right[: good + 1], guessed[good]]
            if good + 2 < len(right):
                cache.crop(good + 2 - len(right))
        while found[-1] != right[-1] and len(found) < len(right) + 16:
            found.append(int(self._logits(found[-1:], cache)[-1].argmax()))
        return tuple(found)

    def _logits(self, tokens: Sequence[int], cache: DynamicCache, *, keep: int = 0) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], device=self.device)
        logits: torch.Tensor = self.network(ids, past_key_values=cache, logits_to_keep=keep).logits[0]
        return logits


class Bench:
    """A model, asked about one context after the other.

    Args:
        model: the decoder.
        window: positions it was trained for.
        longest: contexts of more tokens are not read by full attention.
    """

    def __init__(self, model: Model, *, window: int, longest: int) -> None:
        self.model, self.window, self.longest = model, window, longest
        self.form, self.stock, self.sharing = Form(model), Stock(model), Sharing(model)

    def open(self, context: Context) -> Opened:
        """Encode a context's units once, and read it in full once."""
        return Opened(self, context)


class Opened:
    """One context: its units' rows, and the caches of full attention."""

    def __init__(self, bench: Bench, context: Context) -> None:
        self.bench, self.context = bench, context
        form = bench.form
        # The store is where the engine finds the units again when an answer has to be decoded.
        self.caches = Caches(bench.model, MemoryStore())
        self.texts = context.parts
        self.units = [form.text.tokenize(part) for part in self.texts]
        self.sources = context.sources
        start = time.perf_counter()
        self.rows: list[KV] = [d.kv for d in self.caches.documents(form.prefix, self.units)]
        self.encode_seconds = time.perf_counter() - start
        self.prefix = self.caches.prefix(form.prefix)
        self._behind: dict[str, list[KV]] = {"": self.rows}
        self._read: dict[int, tuple[DynamicCache, float]] = {}
        self._similarities: dict[str, tuple[float, ...]] = {}

    def arrangement(self, question: str, behind: str = "") -> Arrangement:
        """The prompt as the engine composes it, of units that were encoded behind something or not."""
        if behind not in self._behind:
            contexts = self._before() if behind == "before" else self._similar()
            self._behind[behind] = self.caches.encode(self.bench.form.prefix, self.units, contexts)
        plan = self.bench.form.plan(self.units, question)
        return compose(plan, self.prefix, self._behind[behind], self.sources)

    def _before(self) -> list[tuple[int, ...]]:
        """For each unit, the parts before it in its document."""
        found = []
        for document in self.context.documents:
            found += [self._joined(document.parts[:i]) for i in range(len(document.parts))]
        return found

    def _similar(self, count: int = 2) -> list[tuple[int, ...]]:
        """For each unit, the most similar others of the context, the most similar one last."""
        vectors = torch.tensor(numpy.array(HashedEmbedding()(self.texts)))
        likeness = torch.nn.functional.normalize(vectors, dim=-1)
        likeness = (likeness @ likeness.T).fill_diagonal_(-1.0)
        count = min(count, len(self.texts) - 1)
        nearest = likeness.topk(count).indices.flip(-1).tolist() if count else [[] for _ in self.texts]
        return [self._joined([self.texts[i] for i in near]) for near in nearest]

    def _joined(self, parts: Sequence[str]) -> tuple[int, ...]:
        form = self.bench.form
        return joined_tokens(form.text, form.prompt.before(parts))

    def num_tokens(self, question: str, num_units: int | None = None) -> int:
        """Length of the prompt with the first units."""
        return self.bench.form.plan(self.units[:num_units], question).num_tokens

    def full(self, asked: Asked, num_units: int) -> tuple[tuple[int, ...], float]:
        """Answer of full attention over the first units, and the seconds to its first token."""
        form = self.bench.form
        question, right = form.question(asked.question.text), form.answer(asked.question.answer)
        if num_units not in self._read:
            documents = form.plan(self.units[:num_units], asked.question.text).tokens[: -len(question)]
            self._read[num_units] = self.bench.stock.read(documents)
        cache, before = self._read[num_units]
        tokens, seconds = self.bench.stock.ask(cache, question, right)
        return tokens, before + seconds

    def num_fitting(self, question: str) -> int:
        """Units of the documents that fit into the window, those from the end of retrieval order left out."""
        borders = [0]
        for document in self.context.documents:
            borders.append(borders[-1] + len(document.parts))
        room = self.bench.window - ROOM
        return next((n for n in reversed(borders[1:]) if self.num_tokens(question, n) <= room), 0)

    def ask(
        self,
        questions: Sequence[tuple[Asked, Sequence[Entry]]],
        seed: int,
        *,
        timed: bool = False,
        told: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    ) -> list[dict[str, Any]]:
        """Questions in every way; a record of each.

        Args:
            questions: of this context, and the ways wanted.
            seed: of the controls.
            timed: every way is read on its own, on the clock; else all in the same passes.
            told: by kind, what earlier runs wrote down.
        """
        told = {} if told is None else told
        begun = [self._begin(asked, told.get(asked.question.kind, {}), timed=timed) for asked, _ in questions]
        works: list[Work[Result]] = []
        places = []
        self.bench.sharing.known = Known()
        for one, (_, entries) in zip(begun, questions, strict=True):
            for entry in entries:
                if len(self.context.documents) >= entry.least:
                    works.append(self._work(one, entry, seed, timed=timed))
                    places.append((one, entry.name))
        model, sharing = self.bench.model, self.bench.sharing
        found = [alone(model, work) for work in works] if timed else together(sharing, works)
        sharing.known = Known()
        for (one, name), result in zip(places, found, strict=True):
            one.results[name] = result
        return [one.written() for one in begun]

    def _begin(self, asked: Asked, told: Mapping[str, Sequence[Any]], *, timed: bool) -> _Begun:
        """What full attention says."""
        text, right = asked.question.text, self.bench.form.answer(asked.question.answer)
        num, fitting, tokens = len(self.units), self.num_fitting(text), self.num_tokens(text)
        results: dict[str, Result] = {}
        greedy: tuple[int, ...] | None = None
        seconds = 0.0
        # Of one question, all answers are compared with full attention or none.
        if FULL in told if told else tokens <= self.bench.longest:
            if told and told[FULL][0] and not timed:
                greedy = right
            else:
                greedy, seconds = self.full(asked, num)
                results[FULL] = Result(greedy == right, True, seconds if timed else None)
        if TRUNCATED not in told or timed:
            beyond = fitting < num or greedy is None
            short, seconds = self.full(asked, fitting) if beyond else (greedy, seconds)
            results[TRUNCATED] = Result(short == right, short == greedy, seconds if timed else None)
        record = {
            "kind": asked.question.kind,
            "documents": len(self.context.documents),
            "rank": self.context.rank,
            "place": self.context.place,
            "units": num,
            "tokens": tokens,
            "fits": fitting == num,
        }
        return _Begun(asked, right, greedy, record, results)

    def _work(self, begun: _Begun, entry: Entry, seed: int, *, timed: bool) -> Work[Result]:
        """One policy's answer."""
        needed = begun.asked.needed
        truth = tuple(float(i in needed) for i in range(len(self.units)))
        policy = entry.make(Hint(truth, seed, self._near(begun.asked.question.text)))
        if entry.decoded:
            return self._decoded(begun, policy, timed=timed)
        prompt = self.arrangement(begun.asked.question.text, entry.behind)
        return self._looked(begun, prompt, policy, is_plain=entry.name == PLAIN, timed=timed)

    def _near(self, question: str) -> tuple[float, ...]:
        """Similarity of each unit to a question, by the words they share."""
        if question not in self._similarities:
            one, *others = numpy.array(HashedEmbedding()([question, *self.texts]))
            self._similarities[question] = tuple(float(one @ other) for other in others)
        return self._similarities[question]

    def _looked(
        self, begun: _Begun, arrangement: Arrangement, policy: Policy, *, is_plain: bool, timed: bool
    ) -> Work[Result]:
        model = self.bench.model if timed else self.bench.sharing
        start = time.perf_counter()
        looked = yield from looking(model, arrangement, policy, max_new_tokens=ROOM)
        first = int(looked.read.logits[-1].argmax())
        seconds = time.perf_counter() - start if timed else None
        if is_plain:
            risk = looked.risk
            begun.record["risk"] = [round(r, 5) for r in (risk.entropy, risk.others, risk.doubt)]
            begun.record["best"] = self._best(looked, begun.asked)
        said = yield from saying(looked, policy, begun.right, first)
        is_right = said == begun.right
        is_same = begun.greedy is not None and (
            yield from _says(looked, policy, begun.greedy, first, known=said)
        )
        return Result(is_right, is_same, seconds, looked.recomputed)

    def _decoded(self, begun: _Begun, policy: Policy, *, timed: bool) -> Work[Result]:
        form, right, greedy = self.bench.form, begun.right, begun.greedy
        request = Request(
            form.prompt.render(self.texts, begun.asked.question.text),
            {str(i): text for i, text in enumerate(self.texts)},
            form.prompt.prefix,
            form.prompt.is_rendered,
            Sampling(max_new_tokens=max(len(right), len(greedy or ()))),
            policy,
            sources={str(i): source for i, source in enumerate(self.sources)},
        )
        given = yield from _finished(answer(self.caches, request))
        tokens, seconds = given.tokens, given.timing.prefill if timed else None
        return Result(tokens == tuple(right), tokens == greedy, seconds)

    def _best(self, looked: Look, asked: Asked) -> list[list[int]]:
        """For each way of scoring, the layers whose best unit holds a fact, as 0 or 1."""
        return [
            [int(best in asked.gold) for best in scores.argmax(-1).tolist()] for scores in unit_scores(looked)
        ]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A question, what full attention said, and the results so far."""

    asked: Asked
    right: tuple[int, ...]
    greedy: tuple[int, ...] | None
    record: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """The record."""
        return self.record | {"answers": {name: result.packed() for name, result in self.results.items()}}


def _finished(work: Generator[Any, Any, Any]) -> Work[Answer]:
    """What an answer's work comes to."""
    event = next(work)
    while not isinstance(event, Answer):
        event = work.send((yield event) if isinstance(event, Want) else None)
    work.close()
    return event


def unit_scores(looked: Look) -> torch.Tensor:
    """[variant, L, U]: attention of the question to each unit, in the order of `VARIANTS`."""
    units = [i for i, s in enumerate(looked.composed.table) if s.document is not None]
    first, found = looked.composed.question, []
    for seen in (looked.read.mass[:, units], looked.read.focus[:, units]):
        found += [seen[..., first:].mean(-1), seen[..., -1]]
    return torch.stack(found)


def saying(looked: Look, policy: Policy, tokens: Sequence[int], first: int) -> Work[tuple[int, ...]]:
    """What greedy decoding says behind a look, as far as it says these tokens, and the first that differs."""
    if first != tokens[0] or len(tokens) == 1:
        return (first,)
    rows, end = looked.fresh, looked.composed.end
    before = rows.num_rows
    found = yield Every(
        looked.tables.seen_from(before),
        tokens[:-1],
        range(end, end + len(tokens) - 1),
        rows,
        Looking(policy.group) if policy.group else None,
    )
    # Another answer may be tried behind the same rows.
    rows.cut(before)
    del rows.positions[before:]
    return tuple(_agreed((first, *found.logits.argmax(-1).tolist()), tokens))


def _agreed(said: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
    for guess, token in zip(said, tokens, strict=True):
        yield guess
        if guess != token:
            return


def _says(
    looked: Look, policy: Policy, tokens: Sequence[int], first: int, *, known: Sequence[int]
) -> Work[bool]:
    """Whether greedy decoding begins with these tokens, if what is known of it does not tell."""
    both = min(len(known), len(tokens))
    if tuple(known[:both]) != tuple(tokens[:both]) or both == len(tokens):
        return tuple(known[:both]) == tuple(tokens[:both])
    return (yield from saying(looked, policy, tokens, first)) == tuple(tokens)
