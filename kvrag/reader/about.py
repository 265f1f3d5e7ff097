"""An auxiliary task of training: in the middle of the model, every word of a document knows whom it is about.

A later part of a document says "she" and "it" only. That a value belongs to the name in the title has to be
known where the question will look for it; asked for directly at every word, that is learned from far fewer
tokens than through answers alone. The projections are training's own and are not part of the reader.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layers after which it is asked: what comes later compares questions with documents, and needs to know.
LAYERS = (1, 2)


class About(nn.Module):
    """Predicts the two words of a name from the residual stream.

    Args:
        width: of the residual stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.randn(len(LAYERS), 2, width, width) * width**-0.5)

    def forward(self, after: Sequence[Tensor], about: Tensor, embeddings: Tensor) -> tuple[Tensor, float]:
        """Mean cross entropy over the names of the batch, and the share of words found after the last layer.

        Args:
            after: the residual stream [B, T, d] after each layer of the model.
            about: [B, T, 2] ids of the names' words, -1 where there is none.
            embeddings: [V, d] of the model's words.
        """
        asked = about[..., 0] >= 0
        if not asked.any():
            return embeddings.new_zeros(()), 0.0
        names, target = about[asked].unique(return_inverse=True)
        words = F.normalize(embeddings[names], dim=-1)
        losses, right = [], 0.0
        for layer, projections in zip(LAYERS, self.projections, strict=True):
            rows = F.normalize(after[layer][asked], dim=-1)
            for i, projection in enumerate(projections):
                logits = 20 * F.normalize(rows @ projection, dim=-1) @ words.T
                losses.append(F.cross_entropy(logits, target[:, i]))
                right = (logits.argmax(-1) == target[:, i]).float().mean().item()
        return torch.stack(losses).mean(), right
