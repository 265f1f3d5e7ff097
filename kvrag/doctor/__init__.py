"""Proof and measurement for one model: is composing exact, what do policies cost, which layers to trust."""

from kvrag.doctor.examination import Report, examine
from kvrag.doctor.fitting import CodecFit, fit_codec
from kvrag.doctor.words import describe

__all__ = ["CodecFit", "Report", "describe", "examine", "fit_codec"]
