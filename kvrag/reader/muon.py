"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, "Muon: An optimizer")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices only; those of one shape, or its transpose, are orthogonalised together.

    Args:
        params: 2-D parameters.
        lr: step length relative to an orthogonal update.
        momentum: of the moving average of gradients (Nesterov form).
        weight_decay: times `lr`, per step.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                alike[tuple(sorted(p.shape))].append((p, _wide(update)))
            for pairs in alike.values():
                updates = orthogonalised(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    length = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.mT if p.shape[0] > p.shape[1] else update, alpha=length)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """The matrices [n, rows, columns] with singular values near 1, by Newton-Schulz iteration."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, a, x, beta=3.4445)
    return x
