"""Whether all sides compute the same, before anything is timed."""

from __future__ import annotations

import torch
from peers_parts.ours import Ours
from peers_parts.plain import stock_attention
from peers_parts.taking import Sides
from peers_parts.turborag import TurboRag

ALLOWED = {"TurboRAG's way": 1e-3, "llama.cpp F32": 1e-1}
"""Largest difference of logits, in standard deviations of the logits, above which nothing is measured.

llama.cpp's rows are float16, and over thousands of tokens that shows in the second digit.
"""


@torch.inference_mode()
def agreement(sides: Sides, num_documents: int) -> dict[str, float]:
    """Largest difference of the last token's logits, in standard deviations of the logits.

    TurboRAG's way against kvrag (documents do not see each other), llama.cpp against transformers (they do).

    Raises:
        SystemExit: somebody computes something else.
    """
    request = sides.pool.ask(sides.pool.draw(num_documents))
    prompt = sides.pool.prompt(request)
    ours, turbo = sides.stored["kvrag"], sides.stored["TurboRAG's way"]
    assert isinstance(ours, Ours)
    assert isinstance(turbo, TurboRag)
    found = {"TurboRAG's way": _apart(turbo.logits(request), ours.first(request)[2].logits[-1])}
    found["TurboRAG's way, rows"] = _apart(turbo.load(0), turbo.alone(0))
    if sides.llama:
        with stock_attention(ours.network):
            ids = torch.tensor([prompt])
            wanted = ours.network(ids, logits_to_keep=1).logits[0, -1]
        for kind in sides.llama.kinds:
            made = sides.llama.logits(kind, prompt, sides.folder / "logits.npy")
            found[f"llama.cpp {kind}"] = _apart(made, wanted)
    for name, most in ALLOWED.items():
        if found.get(name, 0.0) > most:
            raise SystemExit(
                f"{name}: logits are {found[name]:.2g} deviations apart, at most {most} expected"
            )
    return found


def _apart(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).abs().max() / wanted.std())
