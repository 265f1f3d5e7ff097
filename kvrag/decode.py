"""One token at a time, chosen by transformers' own processors and stopping criteria, until a stop."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from kvrag.attention import Looking, Tables
from kvrag.config import Sampling
from kvrag.fresh import FreshRows
from kvrag.grammars import Keeper
from kvrag.model import Model
from kvrag.prefill import Read, Want
from kvrag.replay import ReplayedWant, Replays, can_replay
from kvrag.rotary import LayerSpec
from kvrag.segments import SegmentTable


@dataclass(frozen=True, slots=True)
class Choice:
    """What transformers makes of the settings: how scores are processed and when to stop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    generator: torch.Generator | None
    logprobs: int | None = None
    keeper: Keeper | None = None


def configuration(network: Any, sampling: Sampling) -> GenerationConfig:
    """The settings in transformers' form; what they leave open is the model's own."""
    config: GenerationConfig = copy.deepcopy(network.generation_config)
    config.max_new_tokens, config.max_length = sampling.max_new_tokens, None
    config.num_beams, config.use_cache = 1, False
    config.do_sample = sampling.temperature > 0
    if config.pad_token_id is None:  # never used for one prompt, but transformers warns of it every time
        config.pad_token_id = 0
    if sampling.ignore_eos:  # None would be replaced by the model's own; this token does not exist
        config.eos_token_id = network.config.get_text_config(decoder=True).vocab_size
    if config.do_sample:
        config.temperature = sampling.temperature
        for name in ("top_k", "top_p", "min_p"):
            if (value := getattr(sampling, name)) is not None:
                setattr(config, name, value)
    else:  # greedy: transformers warns of sampling settings without effect, and puts the model's own for None
        config.temperature, config.top_k, config.top_p, config.min_p = 1.0, 50, 1.0, None
    if sampling.repetition_penalty is not None:
        config.repetition_penalty = sampling.repetition_penalty
    return config


def end_tokens(model: Model) -> tuple[int, ...]:
    """Tokens that end an answer; maybe none."""
    ends = model.network.generation_config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (int(ends),)


def choice(model: Model, prompt: Sequence[int], sampling: Sampling) -> Choice:
    """Let transformers build processors and criteria for a prompt.

    Args:
        model: the decoder.
        prompt: all tokens, cached ones included: penalties and lengths count them as in an ordinary run.
        sampling: the settings.
    """

    def take(
        _model: Any,
        _ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig]:
        return logits_processor, stopping_criteria, generation_config

    ids = torch.tensor([list(prompt)], device=model.device)
    generate: Any = model.network.generate  # of a mixin that the base class does not name
    processors, criteria, config = generate(
        ids,
        generation_config=configuration(model.network, sampling),
        attention_mask=torch.ones_like(ids),
        custom_generate=take,
    )
    keeper = None
    if sampling.constraint is not None:
        keeper = model.text.grammars.keeper(sampling.constraint, end_tokens(model))
    generator = None
    if config.do_sample:
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        generator = torch.Generator(device=model.device).manual_seed(seed)
    return Choice(processors, criteria, bool(config.do_sample), generator, sampling.logprobs, keeper)


# On two CPU cores: what one more segment costs a layer in calls, and how fast rows are turned and copied.
_CALL_SECONDS = 40e-6
_COPY_BYTES_PER_SECOND = 1e9


class _Rent:
    """When to copy a table into one run: once its segments have cost as much in calls as the copy would.

    Not knowing how long the answer gets, this never costs more than twice the better choice (the
    rent-or-buy rule).
    """

    def __init__(self, table: SegmentTable, num_layers: int) -> None:
        self._price = sum(s.kv.num_bytes for s in table) / _COPY_BYTES_PER_SECOND
        self._per_step = len(table) * num_layers * _CALL_SECONDS
        self._paid = 0.0

    def is_spent(self) -> bool:
        """Count one step; True when it is time to copy."""
        self._paid += self._per_step
        return self._paid >= self._price


Ranked = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token.

    Attributes:
        token: its id.
        mass: [L, S], float32: attention of the row that chose it to each segment, mean over heads.
        focus: [L, S], float32: the same for squared attention.
        documents: [S], number of the document that each segment is, None for the prefix.
        columns: attention to single rows of each segment, by layer, where it was asked for.
        is_last: a stopping criterion holds.
        logprobs: the token and then the likeliest tokens, with their log-probabilities, where asked for.
        is_complete: the answer has the form that it was to have.
    """

    token: int
    mass: torch.Tensor
    focus: torch.Tensor
    documents: tuple[int | None, ...]
    columns: Mapping[int, list[torch.Tensor]]
    is_last: bool
    logprobs: Ranked = ()
    is_complete: bool = False


class Chooser:
    """Chooses an answer's tokens, one after the other."""

    def __init__(self, chosen: Choice, prompt: Sequence[int], *, device: torch.device) -> None:
        """Choose what follows a prompt.

        Args:
            chosen: from `choice`.
            prompt: all its tokens, in order.
            device: of the model.
        """
        self._chosen = chosen
        self._ids: Any = torch.tensor([list(prompt)], device=device)  # transformers asks for a LongTensor

    def step(self, last: Read, documents: tuple[int | None, ...]) -> Step:
        """Choose by the last row that was read.

        Args:
            last: what reading it gave.
            documents: of its segments, see `Step`.
        """
        chosen, raw = self._chosen, last.logits[-1:].float()
        # The mask comes first: of what is left, the likeliest are taken.
        possible = raw.clone() if chosen.keeper is None else chosen.keeper.mask(raw)
        scores = chosen.processors(self._ids, possible)
        if chosen.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=chosen.generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self._ids = torch.cat((self._ids, token), dim=1)
        if chosen.keeper is not None:
            chosen.keeper.take(int(token))
        is_complete = chosen.keeper is not None and chosen.keeper.is_complete
        return Step(
            int(token),
            last.mass[..., -1],
            last.focus[..., -1],
            documents,
            last.columns,
            is_complete or bool(chosen.criteria(self._ids, scores).all()),
            () if chosen.logprobs is None else ranked(raw[0], int(token), chosen.logprobs),
            is_complete,
        )


def ranked(logits: torch.Tensor, token: int, num_top: int) -> Ranked:
    """A token and the likeliest ones, best first, with their log-probabilities.

    Args:
        logits: [V], float32, as the model gives them.
        token: the one that was chosen.
        num_top: how many of the likeliest.
    """
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(num_top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return (token, float(logprobs[token])), *pairs


def _is_copyable(table: SegmentTable) -> bool:
    """Whether one run for all layers can stand for several segments."""
    return len(table) > 1 and all(s.until_layer is None for s in table)


def _device(table: SegmentTable, fresh: FreshRows) -> torch.device:
    """Where an answer's tokens are read."""
    return fresh.device or next((s.kv.device for s in table), torch.device("cpu"))


class Behind:
    """What an answer's tokens read; copied into one run once that pays.

    Attributes:
        documents: for each segment, the number of its document; None for the prefix.
    """

    def __init__(
        self,
        tables: SegmentTable | Tables,
        fresh: FreshRows,
        specs: Sequence[LayerSpec],
        *,
        looking: Looking | None = None,
    ) -> None:
        """Read `tables` and `fresh`, which was filled by the prompt.

        Args:
            tables: as the first token after the prompt sees them.
            fresh: rows of the prompt; extended by the answer.
            specs: of the model's layers.
            looking: what it asks for needs the segments apart: nothing is copied then.
        """
        self.fresh = fresh
        self._looking, self._specs = looking, specs
        self.change(tables)

    def change(self, tables: SegmentTable | Tables, *, for_good: bool = True) -> None:
        """Read other segments from the next token on.

        Args:
            tables: possible only until the segments were copied.
            for_good: they will not change again, and may be copied.
        """
        if self.fresh.parts is not None:
            raise ValueError("the segments are copied already")
        self._tables = tables
        self._rent: _Rent | None = None
        table = tables if isinstance(tables, SegmentTable) else tables.at(0)
        self.documents = tuple(s.document for s in table)
        self._replays: Replays | None = None
        if can_replay(tables, self.fresh, self._specs, self._looking, _device(table, self.fresh)):
            self._replays = Replays()
        elif for_good and self._looking is None and isinstance(tables, SegmentTable) and _is_copyable(tables):
            self._rent = _Rent(tables, len(self._specs))
            if self.fresh.standing:  # only in the copy do they count as their documents' rows
                self._rent = _Rent(SegmentTable(), 0)

    def want(self, token: int, position: int) -> Want:
        """One more token, to be read."""
        if self._rent is not None and self._rent.is_spent() and isinstance(self._tables, SegmentTable):
            self.fresh = self.fresh.behind(self._tables, self._specs)
            self._tables, self._rent = SegmentTable(), None
        wanted = (self._tables, [token], [position], self.fresh, self._looking)
        return Want(*wanted) if self._replays is None else ReplayedWant(*wanted, replays=self._replays)


def steps(
    model: Model,
    behind: Behind,
    prompt: Sequence[int],
    last: Read,
    documents: tuple[int | None, ...],
    chosen: Choice,
    *,
    position: int,
) -> Iterator[Step]:
    """Decode token by token, every token in a pass of its own.

    Args:
        model: the decoder.
        behind: what the tokens read; the caller may change it between two tokens.
        prompt: all tokens of the prompt, in order.
        last: of the prompt; its last row chooses the first token.
        documents: of its segments, see `Step`.
        chosen: from `choice`.
        position: of the first new token.

    Yields:
        Tokens in order; the last one has `is_last` set.
    """
    chooser = Chooser(chosen, prompt, device=model.device)
    while True:
        step = chooser.step(last, documents)
        yield step
        if step.is_last:
            return
        last, documents = behind.want(step.token, position).read(model), behind.documents
        position += 1
