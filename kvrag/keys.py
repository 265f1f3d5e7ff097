"""Secret keys in files and variables: 32 bytes, written as 64 hexadecimal digits."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from kvrag.errors import ConfigError

KEY_BYTES = 32

_DIGITS = re.compile(r"[0-9a-fA-F]{64}")


def write_key(path: str | Path) -> bytes:
    """Write a new random key to a file that only its owner can read; the key.

    Keep the file away from the data that it protects, and a copy of it somewhere: what is encrypted under a
    lost key is lost.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    key = secrets.token_bytes(KEY_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already; a key is never overwritten") from error
    except OSError as error:
        raise ConfigError(f"the key cannot be written to {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(key.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return key


def read_key(value: str | Path) -> bytes:
    """The key that a text is, or that the file of this name holds.

    Raises:
        ConfigError: neither 64 hexadecimal digits nor a file of them. The message shows no digit of a key.
    """
    text = str(value).strip()
    if not _DIGITS.fullmatch(text):
        try:
            text = Path(text).expanduser().read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:  # no such file, or not text
            raise ConfigError(
                f"a key is 64 hexadecimal digits, or the name of a file that holds them; the {len(text)} "
                "characters given are neither. kvrag.keys.write_key(path) makes such a file"
            ) from error
    if not _DIGITS.fullmatch(text):
        raise ConfigError(f"the key file holds {len(text)} characters; expected 64 hexadecimal digits")
    return bytes.fromhex(text)
