"""What caches would take: bytes against real files, shapes against real models, arithmetic of seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kvrag.documents import Document
from kvrag.encoding import encode
from kvrag.errors import ConfigError, InputError
from kvrag.shapes import ModelShape, of_network, shape_of
from kvrag.sizing import Sizer, break_even, estimate_size
from kvrag.store import layout
from kvrag.store.codec import CODECS
from kvrag.store.key import EntryKey
from kvrag.testing.models import FAMILIES, tiny, tiny_model, tiny_tokenizer
from kvrag.testing.stores import example_fingerprint, example_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return str(made)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_from_the_configuration_are_those_of_real_rows(family: str) -> None:
    config = FAMILIES[family]()
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    found = of_network(network, config)
    (rows,) = encode(tiny(family), [(5, 6, 7)], None, token_budget=64)
    assert found.layers == tuple((x.keys.shape[0], x.keys.shape[2], x.values.shape[2]) for x in rows.layers)
    assert found.num_parameters == sum(p.numel() for p in tiny_model(family).parameters())
    assert 0 < found.active_parameters <= found.num_parameters


def test_no_weights_are_needed(model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    assert shape_of(str(tmp_path)) == shape_of(model)
    assert shape_of(model).max_length == 4096
    with pytest.raises(ConfigError, match="could not be found"):
        shape_of(str(tmp_path / "nowhere"))


@given(num_tokens=st.integers(1, 700), codec=st.sampled_from(sorted(CODECS)), layers=st.integers(1, 6))
def test_bytes_are_those_of_real_files(num_tokens: int, codec: str, layers: int) -> None:
    shapes = ((2, 32, 32),) * layers
    sizer = Sizer(ModelShape(shapes, 1, 1, "float32", 0), torch.float32)
    from kvrag.rotary import Rotation

    rotations = (Rotation((1.0,) * 4),) * layers
    fingerprint = example_fingerprint(codec=codec, rotations=rotations)
    kv = example_rows(tuple(range(num_tokens)), shapes=shapes)
    manifest, parts = layout.encode(EntryKey(fingerprint, kv.tokens), kv, 1.7e9)
    real = sum(map(len, parts)) + len(layout.dump_manifest(manifest))
    frame = real - sizer.rows(codec, num_tokens) - 4 * num_tokens
    assert sizer.rows(codec, num_tokens) == sum(end - start for start, end in manifest.layer_spans())
    # Headers are estimated; digests of this example are short.
    assert sizer.entry(codec, num_tokens) == pytest.approx(real, abs=0.4 * frame + 600)


@given(prefill=st.floats(1e-6, 1e3), load=st.floats(1e-6, 1e3))
def test_breaking_even(prefill: float, load: float) -> None:
    """After so many questions it has paid off, and after one less it has not."""
    count = break_even(prefill, load)
    if prefill <= load:
        assert count is None
    else:
        assert count is not None
        assert count * (prefill - load) >= prefill * (1 - 1e-6)
        assert (count - 1) * (prefill - load) < prefill * (1 + 1e-6)


def test_duplicates_are_counted_once(model: str) -> None:
    texts = [Document("A ferry crosses the Mirrow.", "a.txt"), Document("A mill grinds rye.", "b.txt")]
    once = estimate_size(texts, model=model)
    twice = estimate_size([*texts, Document("A ferry crosses the Mirrow.", "c.txt")], model=model)
    assert (twice.chunks, twice.duplicates, twice.tokens) == (once.chunks, 1, once.tokens)
    assert [c.num_bytes for c in twice.codecs] == [c.num_bytes for c in once.codecs]
    (copy,) = [d for d in twice.documents if d.source == "c.txt"]
    assert (copy.chunks, copy.duplicates, copy.num_bytes, copy.break_even) == (0, 1, 0, None)
    assert sum(d.num_bytes for d in twice.documents) == twice.codecs[0].num_bytes


def test_what_saves_most_comes_first(model: str) -> None:
    texts = [Document("word " * n, f"{n}.txt") for n in (5, 100, 20)]
    report = estimate_size(texts, model=model)
    assert [d.source for d in report.documents] == ["100.txt", "20.txt", "5.txt"]
    assert report.documents[0].saved_seconds > report.documents[2].saved_seconds


def test_pages_and_lines_are_of_one_file(model: str) -> None:
    texts = [Document(f"Page {n} tells of {n}.", f"x.pdf#page={n}") for n in (1, 2, 3)]
    (document,) = estimate_size(texts, model=model).documents
    assert (document.source, document.chunks) == ("x.pdf", 3)


def test_the_dtype_is_that_of_the_machine(model: str) -> None:
    texts = [Document("A ferry crosses the Mirrow.", "a.txt")]
    full, half = (estimate_size(texts, model=model, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert estimate_size(texts, model=model, device="cpu").dtype == "float32"
    assert full.codecs[0].bytes_per_token == 2 * half.codecs[0].bytes_per_token
    assert full.codecs[0].bytes_per_token == shape_of(model).bytes_per_token(4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"codec": "zip"}, "no codec 'zip'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "nonsense"}, "device is 'nonsense'"),
    ],
)
def test_impossible_settings(model: str, options: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        estimate_size([Document("A ferry.", "a.txt")], model=model, **options)  # type: ignore[arg-type]


def test_no_text(model: str) -> None:
    with pytest.raises(InputError, match="no text found"):
        estimate_size([Document(" ", "a.txt")], model=model)
