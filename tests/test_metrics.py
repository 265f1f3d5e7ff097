"""Counters of an engine, as a snapshot and for Prometheus."""

from __future__ import annotations

import builtins
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import ConfigError, MissingExtra
from kvrag.metrics import Metrics, Snapshot, prometheus
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny

MODEL = tiny()
PREFIX = "Read this.\n\n"
DOCUMENTS = ["The lighthouse of Varn was built in 1871.", "A ferry crosses the Mirrow twice a day."]
PROMPT = PREFIX + "\n\n".join(DOCUMENTS) + "\n\nWhy?"


def ask(engine: Engine) -> Any:
    return engine.answer(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=Sampling(max_new_tokens=3))


def test_what_answers_do_is_counted(tmp_path: Path) -> None:
    with Engine(MODEL, tmp_path / "store") as engine:
        assert engine.metrics() == Snapshot(**{n: {} for n in LABELLED})
        ask(engine)
        first = engine.metrics()
        assert (first.misses, first.encoded_documents, first.answers, first.hits) == (2, 2, 1, {})
        assert first.encoded_tokens == sum(len(MODEL.text.tokenize(text)) for text in DOCUMENTS)
        assert first.encode_seconds > 0
        answer = ask(engine)
        ask(engine)
        found = engine.metrics()
    assert (found.misses, found.answers, found.cancelled) == (2, 3, 0)
    assert found.hits == {"disk": 2, "mapped": 2}
    assert found.decisions == {"load": 4}
    assert found.loaded_bytes == {"disk": answer.usage.cached_bytes, "mapped": 0}
    assert found.load_seconds["disk"] == pytest.approx(sum(d.seconds for d in answer.trace.documents))
    with pytest.raises(AttributeError):
        found.misses = 0  # type: ignore[misc]
    assert first.misses == 2  # a snapshot stays as it was


LABELLED = ("hits", "loaded_bytes", "load_seconds", "decisions")


def test_what_goes_wrong_is_counted(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store", budget_bytes=1)
    with Engine(MODEL, store) as engine:
        ask(engine)
        assert engine.metrics().write_failures == 2
    store = DiskStore(tmp_path / "other")
    with Engine(MODEL, store) as engine:
        ask(engine)
        file = next(store.path.rglob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
        ask(engine)
        assert engine.metrics().quarantines == 1
        with engine.stream(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=Sampling(ignore_eos=True)) as stream:
            next(iter(stream))
        engine.call(lambda: None)
        engine.call(lambda: None)
        assert engine.metrics().cancelled == 1


def test_many_threads_count_right() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.add("misses")
            metrics.loaded("disk", 10, 0.5)
            metrics.decided("load")
            metrics.encoded(1, 3, 0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = metrics.snapshot({"damaged": 7, "of no meaning": 1})
    assert (found.misses, found.hits, found.decisions) == (2000, {"disk": 2000}, {"load": 2000})
    assert (found.loaded_bytes, found.load_seconds) == ({"disk": 20000}, {"disk": 1000.0})
    assert (found.encoded_documents, found.encoded_tokens, found.encode_seconds) == (2000, 6000, 500.0)
    assert found.quarantines == 7
    assert json.loads(json.dumps(found.as_dict()))["hits"] == {"disk": 2000}


def test_prometheus_collects_the_numbers_of_now(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with Engine(MODEL, tmp_path / "store") as engine:
        collector = prometheus(engine, registry)
        assert registry.get_sample_value("kvrag_answers_total") == 0
        ask(engine)
        ask(engine)
        value = registry.get_sample_value
        assert value("kvrag_answers_total") == 2
        assert value("kvrag_document_misses_total") == 2
        assert value("kvrag_document_hits_total", {"tier": "disk"}) == 2
        assert value("kvrag_load_decisions_total", {"choice": "load"}) == 2
        loaded = engine.metrics().loaded_bytes["disk"]
        assert value("kvrag_loaded_bytes_total", {"tier": "disk"}) == loaded
        text = generate_latest(registry).decode()
        assert text.count("# TYPE kvrag_") == len(Snapshot.__dataclass_fields__)
        assert all(line.endswith("counter") for line in text.splitlines() if line.startswith("# TYPE"))
        registry.unregister(collector)
        assert generate_latest(registry) == b""


def test_one_registry_takes_one_engine() -> None:
    registry = CollectorRegistry(auto_describe=True)
    with Engine(MODEL) as engine:
        prometheus(engine, registry)
        with pytest.raises(ConfigError, match="registry of its own"):
            prometheus(engine, registry)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with Engine(MODEL) as engine, pytest.raises(MissingExtra, match=r"kvrag\[metrics\]"):
        prometheus(engine)


def test_a_document_that_stands_twice_was_loaded_once(tmp_path: Path) -> None:
    twice = f"{PREFIX}{DOCUMENTS[0]}\n\n{DOCUMENTS[0]}\n\nWhy?"
    with Engine(MODEL, tmp_path / "store") as engine:
        for _ in range(2):
            answer = engine.answer(twice, DOCUMENTS, prefix=PREFIX, sampling=Sampling(max_new_tokens=2))
            assert len(answer.trace.documents) == 2
        found = engine.metrics()
    assert (found.misses, found.encoded_documents, found.hits) == (1, 1, {"disk": 1})
    assert found.loaded_bytes["disk"] == answer.usage.cached_bytes // 2
