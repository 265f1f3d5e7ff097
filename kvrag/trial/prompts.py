"""Cases as a model's prompts, and what full attention says to them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from kvrag.compose import Arrangement, Unit
from kvrag.encoding import encode
from kvrag.model import Model
from kvrag.prompt import RagPrompt
from kvrag.segments import KV
from kvrag.trial.samples import Case

CONTINUATION = 8  # tokens of the answer at which policies are compared, beside the first


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case, ready to be read under any policy.

    Attributes:
        arrangement: the prompt.
        gold: number of the document that answers the question.
    """

    arrangement: Arrangement
    gold: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole prompt."""
        prefix, units = self.arrangement.prefix, self.arrangement.units
        documents = chain.from_iterable((*unit.kv.tokens, *unit.tail) for unit in units)
        return (*(prefix.tokens if prefix else ()), *documents, *self.arrangement.question)

    @property
    def num_rows(self) -> int:
        """Rows of all documents."""
        return sum(unit.kv.num_tokens for unit in self.arrangement.units)


class Prompts:
    """Writes cases as prompts; reads every document once."""

    def __init__(self, model: Model, form: RagPrompt) -> None:
        """Take the form that answers of this model have."""
        self._model, self._form = model, form
        tokens = model.text.tokenize(form.prefix, first=not form.is_rendered)
        self._prefix = encode(model, [tokens])[0] if tokens else None
        self._known: dict[str, KV] = {}

    def prepare(self, case: Case) -> Prepared | None:
        """The case as a prompt, with as many of its documents as the model's positions hold.

        None: not even two fit, so there is nothing to compare.
        """
        form, text = self._form, self._model.text
        tail = text.tokenize(form.separator)
        question = text.tokenize(f"{form.middle}{case.question}{form.suffix}")
        start = self._prefix.num_tokens if self._prefix else 0
        room = self._model.max_length - start - len(question) - CONTINUATION - 1
        chosen = self._fitting(case, room, len(tail))
        if len(chosen) < 2:
            return None
        units: list[Unit] = []
        at = start
        for number, kv in enumerate(self._encoded([case.documents[i] for i in chosen])):
            units.append(Unit(number, kv, at, tail if number < len(chosen) - 1 else ()))
            at += units[-1].length
        return Prepared(Arrangement(self._prefix, (), tuple(units), question, at), chosen.index(case.gold))

    def _fitting(self, case: Case, room: int, tail: int) -> list[int]:
        """Numbers of documents that fit together; the gold one is among them if any is."""
        chosen: list[int] = []
        for i in sorted(range(len(case.documents)), key=lambda i: i != case.gold):
            room -= len(self._model.text.tokenize(case.documents[i])) + tail
            if room < 0:
                break
            chosen.append(i)
        return sorted(chosen)

    def _encoded(self, texts: Sequence[str]) -> list[KV]:
        if any(text not in self._known for text in texts):  # another world: the last one's are not needed
            tokens = [self._model.text.tokenize(text) for text in texts]
            self._known = dict(zip(texts, encode(self._model, tokens, self._prefix), strict=True))
        return [self._known[text] for text in texts]


@dataclass(frozen=True, slots=True)
class Full:
    """What full attention says.

    Attributes:
        answer: its greedy continuation, all tokens but the last compared.
        logits: [1 + CONTINUATION, V], float32: of the first token and those behind each token of `answer`.
        seconds: to the first token, the whole prompt read.
    """

    answer: tuple[int, ...]
    logits: torch.Tensor
    seconds: float


@torch.inference_mode()
def full_attention(model: Model, tokens: Sequence[int]) -> Full:
    """Read a prompt and continue it by the model's ordinary forward pass, which knows nothing of kvrag."""
    network: Any = model.network
    began = time.perf_counter()
    out = network(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=True)
    found = [out.logits[0, -1].float()]
    answer = [int(found[0].argmax())]
    seconds = time.perf_counter() - began
    while len(found) <= CONTINUATION:
        ids = torch.tensor([answer[-1:]], device=model.device)
        out = network(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0, -1].float())
        answer.append(int(found[-1].argmax()))
    return Full(tuple(answer[:CONTINUATION]), torch.stack(found), seconds)
