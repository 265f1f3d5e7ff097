"""The engine with a store, bad models, bad input, and many callers."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import (
    ConfigError,
    DocumentTooLong,
    EmptyDocument,
    EngineClosed,
    GenerationCancelled,
    InputError,
    UnsupportedModel,
)
from kvrag.model import Model
from kvrag.store import files
from kvrag.store import folder as entry_folder
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer

PREFIX = "Read this.\n\n"
DOCUMENTS = {
    "lighthouse": "The lighthouse of Varn was built in 1871.",
    "ferry": "A ferry crosses the Mirrow twice a day.",
}
PROMPT = f"{PREFIX}{DOCUMENTS['lighthouse']}\n\n{DOCUMENTS['ferry']}\n\nWhy?"
SHORT = Sampling(max_new_tokens=8)


@cache
def model(seed: int = 0) -> Model:
    return tiny(seed=seed)


def ask(engine: Engine) -> Any:
    return engine.answer(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=SHORT)


@cache
def expected() -> tuple[int, ...]:
    """The answer without any store."""
    with Engine(model()) as engine:
        tokens: tuple[int, ...] = ask(engine).tokens
    return tokens


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(tmp_path / "store")
    yield made
    assert made.check().ok


def answer_twice(store: DiskStore) -> None:
    for _ in range(2):
        with Engine(model(), store) as engine:
            assert ask(engine).tokens == expected()


# ---- with a store


def test_the_first_answer_fills_the_store_and_the_second_reads_it(store: DiskStore) -> None:
    with Engine(model(), store) as engine:
        first, second = ask(engine), ask(engine)
    assert first.tokens == second.tokens == expected()
    assert [d.is_hit for d in first.documents] == [False, False]
    assert [d.is_hit for d in second.documents] == [True, True]
    assert [d.key for d in second.documents] == ["lighthouse", "ferry"]
    assert [d.num_tokens for d in second.documents] == [len(s.tokens) for s in second.plan.cached]
    assert store.stats().entries == 2
    assert second.timing.first_token == pytest.approx(
        second.timing.plan + second.timing.load + second.timing.prefill, rel=1e-6
    )


def test_caches_outlive_the_engine(tmp_path: Path) -> None:
    for hits in (False, True):
        with Engine(model(), tmp_path / "store") as engine:
            answer = ask(engine)
        assert [d.is_hit for d in answer.documents] == [hits, hits]
        assert answer.tokens == expected()


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4"])
def test_a_hit_answers_like_the_miss_before(tmp_path: Path, codec: str) -> None:
    with Engine(model(), tmp_path, codec=codec) as engine:
        first, second = ask(engine), ask(engine)
        masses = [[use.mass for use in answer.documents] for answer in (first, second)]
    assert [use.is_hit for use in second.documents] == [True, True]
    assert first.tokens == second.tokens
    assert masses[0] == masses[1]
    with Engine(model(), tmp_path) as engine:  # rows of another codec
        assert [use.is_hit for use in ask(engine).documents] == [False, False]


def test_an_unknown_codec_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no codec 'gzip'; there are raw, fp8, int8, int4"):
        Engine(model(), codec="gzip")


def test_only_what_is_missing_is_read(store: DiskStore) -> None:
    with Engine(model(), store) as engine:
        engine.answer(f"{PREFIX}{DOCUMENTS['ferry']} Why?", DOCUMENTS, prefix=PREFIX, sampling=SHORT)
        answer = ask(engine)
    assert [d.is_hit for d in answer.documents] == [False, True]
    assert answer.tokens == expected()


def data_files(store: DiskStore) -> list[Path]:
    return sorted(store.path.glob("??/*.safetensors"))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 0xFF
    replace(file, bytes(raw))


def replace(file: Path, content: bytes) -> None:
    """As another program would: never into a file that is mapped."""
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: replace(file, file.read_bytes()[:-100]),
        lambda file: replace(file, b""),
        lambda file: file.unlink(),
        lambda file: replace(file.with_suffix(".json"), b"{"),
    ],
    ids=["flipped", "truncated", "empty", "gone", "manifest"],
)
@pytest.mark.parametrize("while_open", [False, True])
def test_a_damaged_file_is_read_anew(store: DiskStore, damage: Any, while_open: bool) -> None:
    with Engine(model(), store) as engine:
        ask(engine)
        if while_open:
            damage(data_files(store)[0])
            answer = ask(engine)
            again = ask(engine)
    if not while_open:
        damage(data_files(store)[0])
        with Engine(model(), store) as engine:
            answer, again = ask(engine), ask(engine)
    assert answer.tokens == again.tokens == expected()
    assert sorted(d.is_hit for d in answer.documents) == [False, True]
    assert [d.is_hit for d in again.documents] == [True, True]
    assert store.stats().damaged == 1
    assert len(data_files(store)) == 2


def test_another_models_store_gives_misses_only(store: DiskStore) -> None:
    with Engine(model(seed=1), store) as engine:
        theirs = ask(engine)
    with Engine(model(), store) as engine:
        ours = ask(engine)
    assert [d.is_hit for d in ours.documents] == [False, False]
    assert ours.tokens == expected()
    assert ours.tokens != theirs.tokens
    assert (store.stats().entries, store.stats().damaged) == (4, 0)
    answer_twice(store)


def test_another_prefix_gives_misses_only(store: DiskStore) -> None:
    with Engine(model(), store) as engine:
        ask(engine)
        other = engine.answer("Other. " + PROMPT, DOCUMENTS, prefix="Other. ", sampling=SHORT)
    assert [d.is_hit for d in other.documents] == [False, False]


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.ENOSPC, errno.EIO], ids=["read-only", "full", "broken"]
)
def test_a_store_that_cannot_be_written_costs_one_warning(
    store: DiskStore, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(entry_folder, "write_partials", refuse)
    with caplog.at_level(logging.WARNING), Engine(model(), store) as engine:
        answers = [ask(engine) for _ in range(3)]
    assert [a.tokens for a in answers] == [expected()] * 3
    assert not any(d.is_hit for a in answers for d in a.documents)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "answers go on without keeping new caches" in caplog.text
    assert str(store.path) in caplog.text
    assert store.stats().entries == 0


def test_a_full_disk_keeps_what_was_there(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no")

    with Engine(model(), store) as engine:
        engine.answer(f"{PREFIX}{DOCUMENTS['ferry']} Why?", DOCUMENTS, prefix=PREFIX, sampling=SHORT)
        monkeypatch.setattr(files.os, "fsync", full)
        assert [d.is_hit for d in ask(engine).documents] == [False, True]
        monkeypatch.undo()
        assert [d.is_hit for d in ask(engine).documents] == [False, True]
        assert [d.is_hit for d in ask(engine).documents] == [True, True]


# ---- documents


def test_encode_gives_each_text_its_rows() -> None:
    with Engine(model()) as engine:
        texts = ["one", "the second text is longer", "3"]
        rows = engine.encode(texts, prefix=PREFIX)
        assert [kv.tokens for kv in rows] == [model().text.tokenize(t) for t in texts]
        (alone,) = engine.encode(texts[1:2], prefix=PREFIX)
        for mine, theirs in zip(rows[1].layers, alone.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)
        assert engine.encode([]) == []


def test_texts_that_cannot_be_encoded_are_refused() -> None:
    with Engine(Model(model().network, tiny_tokenizer(), max_length=40)) as engine:
        with pytest.raises(EmptyDocument, match="text 1 has no tokens"):
            engine.encode(["one", ""])
        with pytest.raises(DocumentTooLong, match=r"41 tokens and 39 fit.*split"):
            engine.encode(["a" * 41])
        assert engine.encode(["a" * 39])[0].num_tokens == 39
        with pytest.raises(DocumentTooLong, match="30 fit"):
            engine.encode(["a" * 31], prefix="b" * 9)


# ---- models that cannot be loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the disk."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    return to


def test_a_model_is_loaded_from_its_folder(folder: Path, tmp_path: Path) -> None:
    with Engine.from_pretrained(folder, store=tmp_path / "store", device="cpu", dtype="float32") as engine:
        assert ask(engine).tokens == expected()
        assert isinstance(engine.store, DiskStore)
        assert engine.model.device == torch.device("cpu")


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded") as caught:
        Engine.from_pretrained(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    assert "Give a folder with config.json" in str(caught.value)


@pytest.mark.parametrize("kind", ["foobar", "t5"])
def test_other_types_of_models_are_unsupported(folder: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"tiny.* is not a decoder that transformers knows"):
        Engine.from_pretrained(changed(folder, tmp_path / "tiny", model_type=kind))


def test_damaged_models_are_config_errors(folder: Path, tmp_path: Path) -> None:
    cut = changed(folder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = [cut, changed(folder, tmp_path / "shape", intermediate_size=100)]
    for path in broken:
        with pytest.raises(ConfigError, match=r"files may be damaged: \S+") as caught:
            Engine.from_pretrained(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cuda", "meta", "mps"])
def test_a_device_that_is_not_there_is_a_config_error(folder: Path, device: str) -> None:
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if here.get(device):
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match=rf"device is '{device}'.*cpu"):
        Engine.from_pretrained(folder, device=device)


@pytest.mark.parametrize("dtype", ["float99", "int8", "nn", "float32x"])
def test_an_impossible_dtype_is_a_config_error(folder: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=rf"dtype is '{dtype}'; expected auto, float32"):
        Engine.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("length", [0, -1, 4097])
def test_an_impossible_length_is_a_config_error(folder: Path, length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length is {length}"):
        Engine.from_pretrained(folder, max_length=length)


# ---- prompts


def test_messages_are_rendered_without_a_second_bos() -> None:
    messages = [{"role": "system", "content": DOCUMENTS["ferry"]}, {"role": "user", "content": "Why?"}]
    with Engine(model()) as engine:
        found = engine.answer(messages, DOCUMENTS, sampling=SHORT)
        text = engine.model.text.render(messages)
        as_text = engine.answer(text, DOCUMENTS, sampling=SHORT)
        rendered = list(engine.stream_rendered(text, DOCUMENTS, sampling=SHORT))
    assert found.plan.tokens.count(1) == 1
    assert found.plan.tokens[0] == 1
    assert [d.key for d in found.documents] == ["ferry"]
    assert as_text.plan.tokens == found.plan.tokens
    assert as_text.plan.text == found.plan.text
    assert "".join(rendered) == found.text


def test_text_gets_the_bos_that_messages_bring() -> None:
    with Engine(model()) as engine:
        assert engine.answer("Hi", sampling=SHORT).plan.tokens[0] == 1
        stream = engine.stream_rendered("Hi", sampling=SHORT)
        assert "".join(stream)
        assert stream.answer is not None
        assert 1 not in stream.answer.plan.tokens


@pytest.mark.parametrize(
    ("prompt", "chunks", "reason"),
    [("", (), "empty"), ([], (), "no messages"), ("Why?", "one text", "list of texts")],
)
def test_prompts_that_cannot_be_used_are_input_errors(prompt: Any, chunks: Any, reason: str) -> None:
    with Engine(model()) as engine, pytest.raises(InputError, match=reason):
        engine.answer(prompt, chunks)


def test_chunks_that_are_not_in_the_prompt_cost_nothing() -> None:
    with Engine(model()) as engine:
        answer = engine.answer("Why?", DOCUMENTS, sampling=SHORT)
    assert answer.documents == ()


# ---- many callers


def test_many_threads_get_their_own_answers(store: DiskStore) -> None:
    prompts = [f"{PREFIX}{DOCUMENTS['ferry']}\n\nWhy {i}?" for i in range(6)]

    def one(engine: Engine, prompt: str) -> tuple[int, ...]:
        assert len(engine.encoder().tokenize(prompt)) > 1
        return engine.answer(prompt, DOCUMENTS, prefix=PREFIX, sampling=SHORT).tokens

    with Engine(model(), store) as engine:
        alone = [one(engine, p) for p in prompts]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda p: one(engine, p), prompts)) == alone
    assert store.stats().entries == 1


def test_async_callers_share_one_engine() -> None:
    async def one(engine: Engine) -> tuple[int, ...]:
        stream = engine.stream(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=SHORT)
        text = "".join([piece async for piece in stream])
        assert stream.answer is not None
        assert stream.answer.text == text
        return stream.answer.tokens

    async def main(engine: Engine) -> list[tuple[int, ...]]:
        return await asyncio.gather(*(one(engine) for _ in range(3)))

    with Engine(model()) as engine:
        assert asyncio.run(main(engine)) == [expected()] * 3


def test_a_cancelled_answer_leaves_the_engine_usable() -> None:
    endless = Sampling(max_new_tokens=4000, ignore_eos=True)
    with Engine(model()) as engine:
        stream = engine.stream(PROMPT, DOCUMENTS, prefix=PREFIX, sampling=endless)
        next(iter(stream))
        stream.cancel()
        with pytest.raises(GenerationCancelled):
            for _ in stream:
                pass
        assert stream.answer is None
        with engine.stream(PROMPT, sampling=endless) as left:
            next(iter(left))
        for _ in engine.stream(PROMPT, sampling=endless):
            break
        assert ask(engine).tokens == expected()


def test_closing_ends_running_answers() -> None:
    engine = Engine(model())
    stream = engine.stream(PROMPT, sampling=Sampling(max_new_tokens=4000, ignore_eos=True))
    next(iter(stream))
    engine.close()
    with pytest.raises(EngineClosed):
        for _ in stream:
            pass
    with pytest.raises(EngineClosed):
        engine.answer("Hi")
    with pytest.raises(EngineClosed):
        engine.encode(["Hi"])
    engine.close()


def test_the_callers_thread_stays_out_of_inference_mode() -> None:
    with Engine(model()) as engine:
        for _ in engine.stream(PROMPT, sampling=SHORT):
            assert not torch.is_inference_mode_enabled()
        assert engine.call(torch.is_inference_mode_enabled)
    assert not torch.is_inference_mode_enabled()
