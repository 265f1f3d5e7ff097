"""How much room and time caches of a corpus would take, and which of them are worth it; nothing is written.

Bytes follow from the model's configuration and the number of tokens, to the byte but for headers. Seconds are
an estimate from the number of parameters and a matrix product on this machine, unless the model is measured.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from kvrag import reader
from kvrag.documents import Document
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.home import CHUNK_TOKENS, chunks_of, file_of
from kvrag.model import READER
from kvrag.prompt import RagPrompt
from kvrag.segments import KV
from kvrag.shapes import ModelShape, shape_of
from kvrag.store.codec import CODECS
from kvrag.text import Text

Tokens = tuple[int, ...]

# Of what a large product reaches, a whole forward pass reaches about so much (batches of chunks, any device).
_EFFICIENCY = 0.6
_ASSUMED_READ = 1e9  # bytes a second, of a usual disk; --measure reads this one
_PROBE_BYTES = 64 << 20
_MEASURED_TOKENS, _MEASURED_SECONDS = 4096, 3.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast this machine is with this model.

    Attributes:
        tokens_per_second: read by the model while ingesting.
        bytes_per_second: read from the disk.
        is_measured: by the model and the disk themselves; otherwise estimated.
    """

    tokens_per_second: float
    bytes_per_second: float
    is_measured: bool


@dataclass(frozen=True, slots=True)
class CodecSize:
    """A corpus under one codec.

    Attributes:
        codec: its name.
        num_bytes: of all caches; 0 if this model's heads cannot be written by it.
        bytes_per_token: of rows alone.
        load_seconds: of an average chunk, from the disk.
        saved_seconds: per question and average chunk, instead of reading it anew; below 0: it does not pay.
        break_even: after how many questions about a chunk its ingestion has paid off; None: never.
    """

    codec: str
    num_bytes: int
    bytes_per_token: float
    load_seconds: float
    saved_seconds: float
    break_even: int | None


@dataclass(frozen=True, slots=True)
class DocumentSize:
    """One file, in the codec that was asked for.

    Attributes:
        source: the file.
        chunks: that it would be cut into.
        tokens: of all of them.
        duplicates: chunks that stand elsewhere, too, and are counted there.
        num_bytes: of its caches.
        prefill_seconds: to read it once.
        saved_seconds: per question and average chunk of it.
        break_even: see `CodecSize`.
    """

    source: str
    chunks: int
    tokens: int
    duplicates: int
    num_bytes: int
    prefill_seconds: float
    saved_seconds: float
    break_even: int | None


@dataclass(frozen=True, slots=True)
class SizeReport:
    """What ingesting would take.

    Attributes:
        model: its name.
        parameters: of the model.
        dtype: of its caches on this machine, uncoded.
        codec: that the documents below are reckoned in.
        documents: files, the most worth caching first.
        chunks: different ones, in all.
        duplicates: chunks that stand somewhere else, too.
        tokens: of all different chunks.
        seconds: to ingest them.
        speed: of this machine.
        codecs: all of them, side by side.
    """

    model: str
    parameters: int
    dtype: str
    codec: str
    documents: tuple[DocumentSize, ...]
    chunks: int
    duplicates: int
    tokens: int
    seconds: float
    speed: Speed
    codecs: tuple[CodecSize, ...]


class _TokenizerOnly:
    """Cuts as an engine would, without one."""

    def __init__(self, source: str, max_length: int) -> None:
        try:
            self._text = Text(AutoTokenizer.from_pretrained(source))
        except Exception as error:  # a damaged file raises whatever its parser raises
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"the tokenizer of {source!r} could not be loaded: {line}") from error
        form = RagPrompt.of(self._text)
        prefix = self._text.tokenize(form.prefix, first=not form.is_rendered)
        self.max_tokens = max(2, (max_length or 4096) - len(prefix))

    def tokenize(self, text: str) -> Tokens:
        return self._text.tokenize(text)


def estimate_size(
    documents: Iterable[Document],
    *,
    model: str = READER,
    dtype: str = "auto",
    device: str | None = None,
    codec: str = "raw",
    chunk_tokens: int = CHUNK_TOKENS,
    by_paragraph: bool = False,
    measure: bool = False,
    folder: Path | None = None,
) -> SizeReport:
    """Reckon what caches of these documents would take; nothing is written but, to measure, a probe file.

    Args:
        documents: what would be ingested.
        model: by folder or hub name; only its configuration and tokenizer are read.
        dtype: of the caches, as `kvrag ingest` would choose it.
        device: that it would compute on.
        codec: that documents are reckoned in.
        chunk_tokens: as for ingestion.
        by_paragraph: as for ingestion.
        measure: load the model, read some of the chunks and a probe file, instead of estimating.
        folder: of the store, whose disk is measured.

    Raises:
        ConfigError: no such model, codec or dtype.
        UnsupportedModel: transformers does not know the model as a decoder.
        InputError: there is no text in the documents.
    """
    if codec not in CODECS:
        raise ConfigError(f"no codec {codec!r}; expected one of {', '.join(CODECS)}")
    source = str(reader.path()) if model == READER else model
    shape = shape_of(source)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    element = _dtype(dtype, where, shape)
    counter = _TokenizerOnly(source, shape.max_length)
    by_file: dict[str, list[Tokens]] = {}
    for document in documents:
        texts = chunks_of(document.text, counter, chunk_tokens, by_paragraph=by_paragraph)
        by_file.setdefault(file_of(document.source), []).extend(counter.tokenize(text) for text in texts)
    if not any(by_file.values()):
        raise InputError("no text found in the given files")
    unique = list(dict.fromkeys(tokens for chunks in by_file.values() for tokens in chunks))
    speed = _measured(model, where, dtype, unique, folder) if measure else _estimated(shape, element, where)
    sizer = Sizer(shape, element)
    total = sum(map(len, unique))
    return SizeReport(
        model=model,
        parameters=shape.num_parameters,
        dtype=str(element).removeprefix("torch."),
        codec=codec,
        documents=tuple(_documents(by_file, sizer, codec, speed)),
        chunks=len(unique),
        duplicates=sum(map(len, by_file.values())) - len(unique),
        tokens=total,
        seconds=total / speed.tokens_per_second,
        speed=speed,
        codecs=tuple(_codec_size(name, unique, sizer, speed) for name in CODECS),
    )


class Sizer:
    """Bytes of a cache, by its number of tokens.

    Args:
        shape: of the model.
        dtype: of its rows.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self._layers, self._dtype = Counter(shape.layers), dtype
        self._known: dict[tuple[str, int], int] = {}

    def rows(self, codec: str, num_tokens: int) -> int:
        """Bytes of keys and values.

        Raises:
            ConfigError: this codec cannot write heads of these sizes.
        """
        known = self._known.get((codec, num_tokens))
        if known is None:
            parts = {s: CODECS[codec].parts(s, num_tokens, self._dtype) for s in self._layers}
            known = sum(n * sum(p.num_bytes for p in parts[s]) for s, n in self._layers.items())
            self._known[codec, num_tokens] = known
        return known

    def entry(self, codec: str, num_tokens: int) -> int:
        """Bytes of both files: rows, tokens, and about what header and manifest take."""
        count, layers = len(CODECS[codec].parts((2, 32, 32), 32, self._dtype)), self._layers.total()
        header = 530 + 76 * count * layers
        manifest = 720 + 50 * layers
        return self.rows(codec, num_tokens) + 4 * num_tokens + header + manifest


def break_even(prefill: float, load: float) -> int | None:
    """After how many questions a cache has saved what its ingestion took; None: never."""
    saved = prefill - load
    return math.ceil(prefill / saved - 1e-9) if saved > 0 else None


def _documents(
    by_file: dict[str, list[Tokens]], sizer: Sizer, codec: str, speed: Speed
) -> list[DocumentSize]:
    seen: set[Tokens] = set()
    found = []
    for source, chunks in by_file.items():
        own = [tokens for tokens in dict.fromkeys(chunks) if tokens not in seen]
        seen.update(own)
        tokens = sum(map(len, own))
        num_bytes = sum(sizer.entry(codec, len(chunk)) for chunk in own)
        prefill, load = tokens / speed.tokens_per_second, num_bytes / speed.bytes_per_second
        found.append(
            DocumentSize(
                source=source,
                chunks=len(own),
                tokens=tokens,
                duplicates=len(chunks) - len(own),
                num_bytes=num_bytes,
                prefill_seconds=prefill,
                saved_seconds=(prefill - load) / max(1, len(own)),
                break_even=break_even(prefill, load) if own else None,
            )
        )
    return sorted(found, key=lambda d: (-d.saved_seconds, d.source))


def _codec_size(codec: str, chunks: Sequence[Tokens], sizer: Sizer, speed: Speed) -> CodecSize:
    tokens = sum(map(len, chunks))
    try:
        num_bytes = sum(sizer.entry(codec, len(chunk)) for chunk in chunks)
        rows = sum(sizer.rows(codec, len(chunk)) for chunk in chunks)
    except ConfigError:
        return CodecSize(codec, 0, 0.0, 0.0, 0.0, None)
    prefill = tokens / len(chunks) / speed.tokens_per_second
    load = num_bytes / len(chunks) / speed.bytes_per_second
    return CodecSize(codec, num_bytes, rows / tokens, load, prefill - load, break_even(prefill, load))


def _dtype(dtype: str, device: str, shape: ModelShape) -> torch.dtype:
    name = dtype if dtype != "auto" else ("float32" if device == "cpu" else shape.dtype)
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    return found


def _estimated(shape: ModelShape, dtype: torch.dtype, device: str) -> Speed:
    """By what a product of two matrices takes here: a token costs two operations for each parameter."""
    try:
        a, b = (torch.ones(*size, dtype=dtype, device=device) for size in ((256, 1024), (1024, 1024)))
        run = _synchronised(lambda: a @ b, device)
        seconds = median(_timed(run) for _ in range(5))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r} and cannot compute here: {error}".splitlines()[0]) from error
    flops = _EFFICIENCY * 2 * 256 * 1024 * 1024 / seconds
    return Speed(flops / (2 * max(1, shape.active_parameters)), _ASSUMED_READ, is_measured=False)


def _measured(model: str, device: str, dtype: str, chunks: Sequence[Tokens], folder: Path | None) -> Speed:
    """By reading some of the chunks, in batches as ingestion does, and a file."""
    with Engine.from_pretrained(model, device=device, dtype=dtype) as engine:
        encoder = engine.encoder()
        usual = sorted(chunks, key=len)[len(chunks) // 4 :]
        step = max(1, len(usual) * 512 // max(1, _MEASURED_TOKENS * 2))
        sample: list[Tokens] = []
        for chunk in usual[::step] * 32:
            sample.append(chunk)
            if sum(map(len, sample)) >= _MEASURED_TOKENS:
                break
        encoder.encode(sample[:1])  # the first pass of a process pays for memory and threads
        done, started = 0, time.perf_counter()
        for start in range(0, len(sample), 8):
            batch = sample[start : start + 8]
            _forget(encoder.encode(batch))
            done += sum(map(len, batch))
            if time.perf_counter() - started > _MEASURED_SECONDS:
                break
        rate = done / (time.perf_counter() - started)
    return Speed(rate, _read_speed(folder), is_measured=True)


def _forget(rows: list[KV]) -> None:
    """Wait for a device to be done with them."""
    if rows and rows[0].layers[0].keys.is_cuda:
        torch.cuda.synchronize()


def _read_speed(folder: Path | None) -> float:
    """Bytes a second of a new file, read from the disk where the operating system lets go of it."""
    parent = folder if folder is not None and folder.is_dir() else Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(4 << 20):
                pass
            return _PROBE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be written, so its speed cannot be measured: {error.strerror}"
        ) from error


def _synchronised(function: Callable[[], Any], device: str) -> Callable[[], None]:
    def run() -> None:
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    run()
    return run


def _timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
