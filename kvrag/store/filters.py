"""What a store does to the bytes of a layer on their way to the file: nothing, compress, encrypt, or both.

Layer by layer, so that a layer can still be read without the others. An entry that nothing was done to is
attended to where it lies; of others each layer is undone, in memory of its own, when it is first touched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from kvrag.errors import ConfigError
from kvrag.store import planes
from kvrag.store.codec import Part
from kvrag.store.damage import Damaged
from kvrag.store.files import PARTIAL, commit, remove, write_partial
from kvrag.store.key import LAYOUT_VERSION
from kvrag.store.sealing import CIPHER, OVERHEAD, Cipher, MasterKey

ZSTD = "zstd"
CHAINS: tuple[tuple[str, ...], ...] = ((), (ZSTD,), (CIPHER,), (ZSTD, CIPHER))
"""What can be done to an entry's bytes, in the order of writing."""
_LEAST_GAIN = 1 / 16  # below it a mapped file is worth more
SEALED = "sealed"
"""Suffix of encrypted data files."""
_NAME = "store.json"
_OPEN = "open it with its key (key=..., KVRAG_STORE_KEY)"


class Filters:
    """How a store writes, and the key that it needs for reading.

    Compressed entries are read by every store, whatever it writes itself.

    Args:
        compress: "zstd" writes smaller files where that gains a sixteenth or more; None: rows as they are.
        key: the master key, 32 bytes: everything is encrypted, and nothing else is read; None: nothing is.

    Raises:
        ConfigError: no such compression, or no key.
        MissingExtra: the library for it is not installed.
    """

    def __init__(self, compress: Literal["zstd"] | None = None, key: bytes | None = None) -> None:
        if compress not in (None, ZSTD):
            raise ConfigError(f"compress={compress!r}: expected 'zstd' or None")
        if compress:
            planes.zstandard()
        self.compress = compress
        self.key = None if key is None else MasterKey(key)
        self._folder: Path | None = None

    @property
    def is_encrypting(self) -> bool:
        """Whether a key was given."""
        return self.key is not None

    def cipher(self, chain: Sequence[str], key_id: str, tenant: str, entry_id: str) -> Cipher | None:
        """What opens the blobs of an entry; None where they are not encrypted.

        Args:
            chain: what was done to them.
            key_id: of the key that it was done with.
            tenant: label of the entry's tenant.
            entry_id: of the entry.

        Raises:
            ConfigError: encrypted, and no key was given, or keys were changed.
            Damaged: not as this store writes: unencrypted, or under another key.
        """
        if self.key is None:
            if CIPHER in chain:
                raise ConfigError(f"the store is encrypted: {_OPEN}")
            return None
        if CIPHER not in chain:
            raise Damaged("the entry is not encrypted, and its store is: somebody else has put it there")
        if not self.key.is_called(key_id):
            if self._folder is not None:
                self.look_at(self._folder)  # keys were changed behind our back: an error, and no damage
            raise Damaged("the entry was encrypted with another key")
        return self.key.cipher(tenant, entry_id)

    def fit(self, chain: Sequence[str], key_id: str) -> bool:
        """Whether this store can read the files of an entry as they are: both open, or under the same key."""
        return (CIPHER in chain) == self.is_encrypting and (self.key is None or self.key.is_called(key_id))

    def check_taken_over(self, chain: Sequence[str], key_id: str) -> None:
        """Refuse the files of an entry that this store could not read.

        Raises:
            ConfigError: it is encrypted and this store is not, or the other way round, or with another key.
        """
        if not self.fit(chain, key_id):
            raise ConfigError(
                "files can only be taken over between stores that are both not encrypted, or with the same "
                "key; load the rows from the one and put them into the other"
            )

    def sealing(self, tenant: str, entry_id: str) -> Cipher | None:
        """What seals the blobs of an entry; None where nothing is encrypted."""
        return None if self.key is None else self.key.cipher(tenant, entry_id)

    def compressed(
        self, layers: Sequence[Sequence[memoryview]], parts: Sequence[Sequence[Part]]
    ) -> list[bytes] | None:
        """Every layer as one frame; None if that is not wanted or gains too little."""
        if self.compress is None:
            return None
        frames = [planes.compress(tensors, kinds) for tensors, kinds in zip(layers, parts, strict=True)]
        sizes = [sum(part.num_bytes for part in kinds) for kinds in parts]
        gains = sum(map(len, frames)) <= (1 - _LEAST_GAIN) * sum(sizes)
        # Rows that shrink by more are no rows of a model, and readers take them for an attack. A layer that
        # grows, among others that shrink, is none that readers expect.
        readable = all(
            len(f) <= size <= planes.MAX_RATIO * len(f) for size, f in zip(sizes, frames, strict=True)
        )
        return frames if gains and readable else None

    def look_at(self, folder: Path) -> bool:
        """Compare the key with what the folder says of itself; whether it is encrypted, or is going to be.

        Raises:
            ConfigError: another key, a key for unencrypted entries, or an unreadable `store.json`.
        """
        note = read_note(folder)
        self._folder = folder
        if self.key is None:
            return note is not None
        if note is None:
            if next(folder.glob("[0-9a-f][0-9a-f]/*.json"), None):
                raise ConfigError(
                    f"the store at {folder} has entries that are not encrypted (or has lost its {_NAME}): "
                    "open it without a key, or choose another folder"
                )
            return True
        if not self.key.is_called(note.key_id):
            raise ConfigError(
                f"the store at {folder} is encrypted with the key {note.key_id[:8]}, "
                f"given was {self.key.id[:8]}"
            )
        if note.previous:
            raise ConfigError(
                f"a change of keys was interrupted in {folder}: "
                "run kvrag.store.rekey.rekey again with both keys"
            )
        return True

    def claim(self, folder: Path) -> None:
        """Note that the folder is encrypted, and with what: before an entry is written, with the lock held.

        Raises:
            ConfigError: it is, with another key or without one given here.
            OSError: it cannot be written.
        """
        key = self.key_for(folder)
        if key is not None and not (folder / _NAME).exists():
            write_note(folder, Note(key.id))

    def key_for(self, folder: Path) -> MasterKey | None:
        """The key that what belongs to the folder is encrypted with; None: nothing is.

        Raises:
            ConfigError: it is encrypted, with another key or without one given here.
        """
        if self.look_at(folder) and self.key is None:
            raise ConfigError(f"the store at {folder} is encrypted: {_OPEN}")
        return self.key


PLAIN = Filters()


def sizes_of(chain: Sequence[str], layer_bytes: Sequence[int], token_bytes: int) -> list[tuple[int, int]]:
    """Fewest and most bytes that each layer, and then the tokens, may have in the file.

    Args:
        chain: what was done to them.
        layer_bytes: of every layer before that.
        token_bytes: the same of the tokens.
    """
    more = OVERHEAD if CIPHER in chain else 0
    exact = (token_bytes + more, token_bytes + more)
    if ZSTD not in chain:
        return [*((size + more, size + more) for size in layer_bytes), exact]
    return [*((size // planes.MAX_RATIO + more, size + more) for size in layer_bytes), exact]


def undo(
    chain: Sequence[str], cipher: Cipher | None, number: int, blob: torch.Tensor, parts: Sequence[Part]
) -> torch.Tensor:
    """The bytes of one layer as its codec wrote them.

    Args:
        chain: what was done to them.
        cipher: of the entry.
        number: of the layer.
        blob: what lies in the file, uint8.
        parts: the codec's tensors.

    Raises:
        Damaged: it cannot be undone, or another number of bytes comes out.
    """
    raw = blob if cipher is None else cipher.open(blob.numpy().data, *place(number, chain))
    return planes.decompress(raw.numpy().data, parts) if ZSTD in chain else raw


def place(number: int, chain: Sequence[str]) -> tuple[str, str]:
    """What a layer's blob is bound to beside its entry."""
    return f"layer {number}", "+".join(chain)


@dataclass(frozen=True, slots=True)
class Note:
    """What an encrypted folder says of itself.

    Attributes:
        key_id: of the key of its entries.
        previous: while keys are changed that of those that still have the one before; else "".
    """

    key_id: str
    previous: str = ""


def read_note(folder: Path) -> Note | None:
    """What the folder says; None if it does not say that it is encrypted.

    Raises:
        ConfigError: `store.json` is not of this form.
    """
    file = folder / _NAME
    try:
        says = json.loads(file.read_bytes())
        version, note = (says["layout"], says["encryption"]), Note(str(says["key_id"]), str(says["previous"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r:.200}): restore it, or remove the whole store"
        ) from error
    if version != (LAYOUT_VERSION, CIPHER):
        raise ConfigError(f"{file} is of another version: {version[0]}, {version[1]}")
    return note


def write_note(folder: Path, note: Note) -> None:
    """Have the folder say so, in one step; the caller holds the store's lock.

    Raises:
        OSError: it cannot be written.
    """
    says = {"layout": LAYOUT_VERSION, "encryption": CIPHER, **asdict(note)}
    partial = folder / f"{_NAME}{PARTIAL}"
    remove(partial)  # of a crash: nobody else is writing one now
    write_partial(partial, [json.dumps(says).encode() + b"\n"])
    commit(partial, folder / _NAME)
