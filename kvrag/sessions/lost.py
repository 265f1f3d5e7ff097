"""What a conversation's memory has lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvrag.sessions.talk import Talk


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A run of tokens of a conversation that memory holds in few places, or nowhere.

    Attributes:
        start: number of its first token in the conversation, counted from 0.
        end: the number behind its last one.
        text: what they say.
        share: of layers and heads, which share holds one of these tokens on average; 0: nowhere.
        archived: share of the tokens that an archive has, and that can come back.
    """

    start: int
    end: int
    text: str
    share: float
    archived: float = 0.0


def forgotten(
    talk: Talk,
    decode: Callable[[Sequence[int]], str],
    at_most: float,
    kept: Sequence[tuple[int, int]] = (),
) -> list[Forgotten]:
    """Runs of neighbouring tokens that are held in at most this share of layers and heads.

    Args:
        talk: the conversation, with its tokens.
        decode: makes text of tokens.
        at_most: the share.
        kept: places that an archive has.
    """
    assert talk.log is not None
    shares = talk.shares()
    lost = (shares <= at_most).tolist()
    borders = [i for i in range(len(lost) + 1) if (i < len(lost) and lost[i]) != (i > 0 and lost[i - 1])]
    is_kept = torch.zeros(len(lost))
    for start, end in kept:
        is_kept[start:end] = 1
    return [
        Forgotten(
            start,
            end,
            decode(talk.log[start:end].tolist()),
            float(shares[start:end].mean()),
            float(is_kept[start:end].mean()),
        )
        for start, end in zip(borders[::2], borders[1::2], strict=True)
    ]
