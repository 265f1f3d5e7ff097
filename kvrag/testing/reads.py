"""Comparing what passes over fresh tokens gave."""

from __future__ import annotations

import torch

from kvrag.prefill import Read


def assert_same_read(found: object, expected: Read) -> None:
    """Equal up to the order of additions in float32: logits, masses, attention to single rows.

    Args:
        found: a `Read`, or else this fails.
        expected: by a pass of the request's own.
    """
    assert isinstance(found, Read), found
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.focus, expected.focus, rtol=1e-4, atol=1e-5)
    assert found.columns.keys() == expected.columns.keys()
    for layer, columns in expected.columns.items():
        for mine, theirs in zip(found.columns[layer], columns, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
