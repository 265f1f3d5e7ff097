"""Proof and measurement for one model: is composing exact, what do policies cost, which layers to trust."""

from kvrag.doctor.examination import Report, examine
from kvrag.doctor.words import describe

__all__ = ["Report", "describe", "examine"]
