import subprocess
import sys

import numpy as np
import pytest
from chromadb.utils.embedding_functions import known_embedding_functions

from kvrag.embedding import HashedEmbedding
from kvrag.errors import ConfigError

TEXTS = [
    "The lighthouse keeper Ada Lindqvist moved to Porto in 1931 and opened a bakery.",
    "Professor Tom Okafor studies volcanic glass in Iceland.",
    "The treaty of Velm was signed by the miners' union after the long strike.",
    "A recipe for rye bread: flour, water, salt and a day of patience.",
    "The observatory on Mount Keld measures the light of distant stars.",
    "Marta Silva restored three fishing boats in the harbour of Vigo.",
]


def near(question: str) -> int:
    embed = HashedEmbedding()
    vectors = np.stack(embed([*TEXTS, question]))
    return int(np.argmax(vectors[:-1] @ vectors[-1]))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Where did Ada Lindqvist open a bakery?", 0),
        ("Who studies the glass of volcanoes?", 1),
        ("Who signed the treaty of Velm after the strike?", 2),
        ("How is rye bread made?", 3),
        ("Which observatory measures stars?", 4),
        ("Who restored the boats in Vigo harbor?", 5),
        ("WHO RESTORED THE BOATS", 5),
    ],
)
def test_it_finds_the_text_that_shares_the_words(question: str, expected: int) -> None:
    assert near(question) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "the of and", "\0", "日本語のテキスト", "😀", "ﬁne ligature", "a" * 10_000]
)
def test_any_text_gives_a_unit_vector(text: str) -> None:
    (vector,) = HashedEmbedding(64)([text])
    assert vector.shape == (64,)
    assert vector.dtype == np.float32
    assert abs(float(np.linalg.norm(vector)) - 1.0) < 1e-6


def test_every_process_gives_the_same_vectors() -> None:
    code = (
        "from kvrag.embedding import HashedEmbedding as H; print(H(32)(['one two three'])[0].tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == HashedEmbedding(32)(["one two three"])[0].tobytes().hex()


def test_chroma_can_rebuild_it() -> None:
    embedding = HashedEmbedding(128)
    rebuilt = known_embedding_functions[embedding.name()].build_from_config(embedding.get_config())
    assert rebuilt.get_config() == {"size": 128}
    assert embedding.default_space() in embedding.supported_spaces()


@pytest.mark.parametrize("size", [0, -1, 1 << 20])
def test_sizes_that_cannot_work(size: int) -> None:
    with pytest.raises(ConfigError, match="size"):
        HashedEmbedding(size)
