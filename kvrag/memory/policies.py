"""Policies by name, and budgets as people write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from typing import Any

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.window import Window

POLICIES: dict[str, Callable[..., MemoryPolicy]] = {
    "full": Full,
    "window": Window,
    "cascade": Cascade,
    "ladder": Ladder,
    "combined": LadderCascade,
}
"""What makes each policy."""

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


def memory_policy(
    name: str, budget: int | str | None = None, *, bytes_per_token: int | None = None, **settings: Any
) -> MemoryPolicy:
    """A policy by its name.

    Args:
        name: one of `POLICIES`.
        budget: tokens (4096, "4096"), or bytes ("512MB", "1.5GiB") of all layers and heads together; None
            for "full" only.
        bytes_per_token: of keys and values of all layers and heads; needed for a budget in bytes.
        settings: fields of the policy; what is not given has its default. A ladder has no default span.

    Raises:
        ConfigError: an unknown name or setting, or a value that cannot work.
    """
    if name not in POLICIES:
        raise ConfigError(f"memory policy is {name!r}; expected one of {', '.join(POLICIES)}")
    make = POLICIES[name]
    fields = signature(make).parameters
    if unknown := sorted(set(settings) - set(fields)):
        raise ConfigError(
            f"{name} has no setting {unknown[0]!r}; expected some of {', '.join(fields) or 'none'}"
        )
    if "budget" in fields:
        if budget is None:
            raise ConfigError(f"{name} needs a budget: tokens such as 4096, or bytes such as 512MB")
        settings["budget"] = tokens_of(budget, bytes_per_token)
    elif budget is not None:
        raise ConfigError(f"{name} has no budget, and {budget!r} was given; choose another policy for one")
    missing = [field for field, x in fields.items() if x.default is x.empty and field not in settings]
    if missing:
        raise ConfigError(f"{name} needs the setting {missing[0]!r}")
    return make(**settings)


def tokens_of(budget: int | str, bytes_per_token: int | None = None) -> int:
    """A budget in tokens, rounded down.

    Args:
        budget: tokens, or bytes with a unit: "512MB" is decimal, "512MiB" binary.
        bytes_per_token: of keys and values of all layers and heads; needed for bytes.

    Raises:
        ConfigError: neither of both, or less than one token.
    """
    if isinstance(budget, int) or budget.strip().isdecimal():
        tokens = int(budget)
    elif (size := _SIZE.fullmatch(budget.strip())) is None:
        raise ConfigError(
            f"budget is {budget!r}; expected tokens such as 4096, or bytes such as 512MB or 2GiB"
        )
    elif bytes_per_token is None or bytes_per_token < 1:
        raise ConfigError(
            f"budget is {budget!r}, and bytes per token are {bytes_per_token}; they must be known"
        )
    else:
        num_bytes = int(float(size[1]) * (1024 if size[3] else 1000) ** _UNITS[size[2].upper()])
        tokens = num_bytes // bytes_per_token
    if tokens < 1:
        raise ConfigError(f"budget is {budget!r}, which is less than one token; expected more")
    return tokens
