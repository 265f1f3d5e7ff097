"""How little the model expected what it reads, message by message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from kvrag.memory.base import Seen
from kvrag.model import Model

MOST_LOGITS = 256
"""Tokens of one pass whose logits are wanted; each takes as many numbers as the vocabulary is large."""


class Surprise:
    """Follows one reading and says what the tokens of its stride are worth."""

    def __init__(self, model: Model) -> None:
        """Begin; what is read first counts as expected, as nobody was asked for it."""
        ends = model.network.generation_config.eos_token_id
        self._ends = [] if ends is None else list(ends) if isinstance(ends, list) else [int(ends)]
        self._next: torch.Tensor | None = None  # logits of the token to come
        self._tokens: list[int] = []
        self._losses: list[torch.Tensor] = []

    @torch.inference_mode()
    def note(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Take tokens that were read, and their logits, [n, V]."""
        targets = torch.tensor(tokens, device=logits.device)
        losses = logits.new_zeros(len(tokens), dtype=torch.float32)
        if self._next is None:
            losses[1:] = F.cross_entropy(logits[:-1].float(), targets[1:], reduction="none")
        else:
            given = torch.cat((self._next[None], logits[:-1]))
            losses[:] = F.cross_entropy(given.float(), targets, reduction="none")
        self._next = logits[-1].clone()
        self._tokens.extend(tokens)
        self._losses.append(losses)

    def cut(self, num_rows: int) -> None:
        """Forget what of the stride came behind the first rows."""
        if num_rows < len(self._tokens):
            self._losses, self._next = [torch.cat(self._losses)[:num_rows]], None
            del self._tokens[num_rows:]

    @torch.inference_mode()
    def seen(self, shape: Sequence[int]) -> Seen:
        """What the stride's tokens are worth, the same everywhere; a new stride begins.

        Args:
            shape: [L, K or 1, capacity] of the memory.
        """
        losses = torch.cat(self._losses)
        ends = torch.isin(torch.tensor(self._tokens), torch.tensor(self._ends)).to(losses.device)
        worth = surprise(losses[None], ends[None]).expand(*shape[:2], -1)
        self._tokens, self._losses = [], []
        return Seen(losses.new_zeros(list(shape)), worth)


def surprise(losses: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a stride's tokens are worth: the mean loss of the message that each belongs to, as far as it goes.

    Args:
        losses: [B, q], negative log-likelihood of each token given all before.
        ends: [B, q], bool: the last token of a message.

    Returns:
        [B, q], dtype of `losses`.
    """
    message = ends.long().cumsum(-1) - ends.long()
    count = int(message.max()) + 1 if message.numel() else 0
    shape = (*losses.shape[:-1], count)
    total = losses.new_zeros(shape).scatter_add_(-1, message, losses)
    length = losses.new_zeros(shape).scatter_add_(-1, message, torch.ones_like(losses))
    return (total / length.clamp_min(1)).gather(-1, message)
