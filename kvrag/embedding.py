"""An embedding that needs no download: hashed words, word pairs and pieces of words."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from kvrag.errors import ConfigError

_WORD = re.compile(r"\w+")
# Words that say little about what a text is about; they count a tenth instead of being dropped, so that a
# question made of nothing else still finds something.
_COMMON = frozenset(
    """
    a about after all also an and any are as at be been before but by can could did do does for from had
    has have  he her his how i if in into is it its me more most my no not of on one or other our out
    she should so some such  than that the their them then there these they this those to up was we were
    what when where which who whom  whose why will with would you your
    """.split()
)
_COMMON_WEIGHT = 0.1
_PAIR_WEIGHT = 0.5
_PIECE_WEIGHT = 0.15
_PIECE_SIZES = (3, 4)


@register_embedding_function
class HashedEmbedding(EmbeddingFunction[Documents]):
    """Unit vectors that are near if two texts share words, word pairs or parts of words.

    A default for trials: it works anywhere, at once and the same on every machine, and finds names and
    terms; it knows nothing of meaning ("car" and "automobile" are strangers). For real use, give the
    collection an embedding model (any Chroma embedding function).

    Each feature is hashed to one of `size` places and a sign, and weighs 1 + ln(count). Chroma notes the
    embedding of a collection by its name: a program that opens the collection with plain chromadb must
    import this module first.

    Args:
        size: length of the vectors.
    """

    def __init__(self, size: int = 1024) -> None:
        if not 16 <= size <= 1 << 16:
            raise ConfigError(f"size={size}: expected 16 to 65536")
        self._size = size

    def __call__(self, input: Documents) -> Embeddings:
        """One unit vector per text, [size] float32; of a text without words, the first axis."""
        return [self._embed(text) for text in input]

    @staticmethod
    def name() -> str:
        """The name under which Chroma notes it with a collection."""
        return "kvrag_hashed"

    def get_config(self) -> dict[str, Any]:
        """What `build_from_config` needs."""
        return {"size": self._size}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> HashedEmbedding:
        """The embedding that `get_config` described."""
        return HashedEmbedding(size=int(config["size"]))

    def default_space(self) -> Space:
        """Cosine distance."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """All of Chroma's: for unit vectors they rank alike."""
        return ["cosine", "l2", "ip"]

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse another size: vectors of two sizes cannot live in one collection."""
        if old_config["size"] != new_config["size"]:
            raise ConfigError(f"size={new_config['size']}: the collection was made with {old_config['size']}")

    def _embed(self, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        vector = np.zeros(self._size, dtype=np.float32)
        counts = Counter(_features(text))
        for (feature, weight), count in counts.items():
            place = xxhash.xxh3_64_intdigest(feature.encode())
            sign = 1.0 if place >> 63 else -1.0
            vector[place % self._size] += sign * weight * (1.0 + math.log(count))
        norm = float(np.linalg.norm(vector))
        if norm == 0.0:
            vector[0] = norm = 1.0  # Chroma takes no zero vector
        return vector / np.float32(norm)


def _features(text: str) -> Iterator[tuple[str, float]]:
    """Names of the text's features with their weights; a prefix keeps the kinds apart."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    for word in words:
        common = word in _COMMON
        yield f"w {word}", _COMMON_WEIGHT if common else 1.0
        if not common:
            for size in _PIECE_SIZES:
                padded = f"<{word}>"
                for i in range(len(padded) - size + 1):
                    yield f"p {padded[i : i + size]}", _PIECE_WEIGHT
    told = [word for word in words if word not in _COMMON]
    for pair in pairwise(told):
        yield f"b {' '.join(pair)}", _PAIR_WEIGHT
