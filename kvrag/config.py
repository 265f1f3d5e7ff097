"""Settings: small frozen values, checked when they are made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from kvrag.constrain import Constraint
from kvrag.errors import ConfigError
from kvrag.keys import read_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is chosen, in transformers' terms (`GenerationConfig`).

    Attributes:
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy; above it, probabilities are sharpened (< 1) or flattened (> 1).
        top_k: sample from the k likeliest tokens; None: the model's own setting.
        top_p: sample from the smallest set that holds this probability; None: the model's own setting.
        min_p: leave out tokens less likely than this share of the likeliest; None: the model's own setting.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely; None: the model's own.
        seed: makes sampling repeatable; None draws one.
        stop: the answer ends before any of these texts; they are never part of it.
        ignore_eos: go on until `max_new_tokens`, for measurements.
        logprobs: say for each token its log-probability, and this many of the likeliest tokens at its
            place (0: none beside the token itself); None: nothing. They are the model's own distribution:
            before temperature, penalties and all else that shapes the choice.
        constraint: the form that the answer has to have (`kvrag.constrain`); once complete, it ends, with
            `ignore_eos` too. None: any.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        if isinstance(self.stop, str):
            raise ConfigError(f"stop is {self.stop!r}; expected a tuple of texts, such as ({self.stop!r},)")
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
        }
        if not isinstance(self.constraint, Constraint | None):
            raise ConfigError(
                f"constraint is a {type(self.constraint).__name__}; expected one of kvrag.constrain, such as "
                "json_schema(...)"
            )
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {allowed}")


Rule = Literal["alone", "before", "similar"]
MAX_SIMILAR = 8


@dataclass(frozen=True, slots=True)
class Context:
    """What the chunks of a collection are encoded behind, beside the prompt's prefix.

    Attributes:
        rule: `alone`: nothing. `before`: the parts before it in its document, the nearest ones that fit.
            `similar`: the most similar chunks of the collection (FusionRAG, arXiv:2601.12904, offline part).
        count: for `similar`, how many; 0 otherwise.
        max_tokens: most tokens of it; None: as many as the model reads in front of the chunk.

    >>> Context.parse("similar:2")
    Context(rule='similar', count=2, max_tokens=None)
    >>> str(Context.parse("before/1024"))
    'before/1024'
    """

    rule: Rule = "alone"
    count: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule is {self.rule!r}; expected one of {', '.join(get_args(Rule))}")
        if self.rule == "similar" and not 1 <= self.count <= MAX_SIMILAR:
            raise ConfigError(f"similar chunks: count is {self.count}; expected 1 to {MAX_SIMILAR}")
        if self.rule != "similar" and self.count:
            raise ConfigError(f"count is {self.count}, but {self.rule!r} counts nothing; expected 0")
        if self.max_tokens is not None and (self.max_tokens < 1 or self.rule == "alone"):
            raise ConfigError(
                f"max_tokens is {self.max_tokens}; expected at least 1, and none at all for 'alone'"
            )

    @classmethod
    def parse(cls, text: str) -> Context:
        """A choice in words: alone, before, similar:2; with /1024 behind it, of at most so many tokens.

        Raises:
            ConfigError: it says something else.
        """
        found = re.fullmatch(r"(alone|before|similar)(?::(\d{1,9}))?(?:/(\d{1,9}))?", text.strip())
        if found is None:
            raise ConfigError(f"context is {text!r}; expected alone, before, before/1024 or similar:2")
        rule, count, limit = found.groups()
        return cls(cast(Rule, rule), int(count or 0), int(limit) if limit else None)

    def __str__(self) -> str:
        """The choice in words, as `parse` reads it."""
        count = f":{self.count}" if self.count else ""
        return f"{self.rule}{count}{f'/{self.max_tokens}' if self.max_tokens else ''}"


ALONE = Context()
BEFORE = Context("before")


def home(environment: Mapping[str, str] | None = None) -> Path:
    """The folder for collections and caches: KVRAG_HOME, or .kvrag in the working folder."""
    found = (os.environ if environment is None else environment).get("KVRAG_HOME")
    return Path(found).expanduser() if found else Path(".kvrag")


def store_key(environment: Mapping[str, str] | None = None) -> bytes | None:
    """The master key of encrypted stores: KVRAG_STORE_KEY, digits or the name of a file; None: no encryption.

    Raises:
        ConfigError: it is no key.
    """
    return _key("KVRAG_STORE_KEY", environment)


def tenant_key(environment: Mapping[str, str] | None = None) -> bytes | None:
    """The secret of the tenant one works for: KVRAG_TENANT_KEY, digits or the name of a file.

    Raises:
        ConfigError: it is no key.
    """
    return _key("KVRAG_TENANT_KEY", environment)


def _key(name: str, environment: Mapping[str, str] | None) -> bytes | None:
    found = (os.environ if environment is None else environment).get(name)
    if not found:
        return None
    try:
        return read_key(found)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
