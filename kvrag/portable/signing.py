"""Ed25519 signatures (RFC 8032): who vouches for caches, whose truth cannot be seen by looking at them."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvrag.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_PREFIX = "kvrag-ed25519:"
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
# What is signed begins with its purpose, so that no signature made for anything else can be used here.
_PURPOSE = b"kvrag portable collection, version 1\0"


def make_keys(path: Path) -> tuple[Path, str]:
    """A new pair: the private key in `path` (PKCS #8, readable by its owner only), the public one beside it.

    Returns:
        The public key's file, `path` with `.pub` behind it, and its one line.

    Raises:
        InputError: one of the files is there already, or they cannot be written.
        MissingExtra: cryptography is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("cryptography", "encrypt") from error
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public, beside = public_line(key), path.with_name(f"{path.name}.pub")
    if path.exists() or beside.exists():
        there = path if path.exists() else beside
        raise InputError(f"{there} exists; keys are never overwritten: choose another name")
    _write(path, private, 0o600)
    _write(beside, f"{public}\n".encode(), 0o644)
    return beside, public


def _write(path: Path, raw: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a file.

    Raises:
        InputError: no such file, or no Ed25519 key without a password in it.
        MissingExtra: cryptography is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("cryptography", "encrypt") from error
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; kvrag keygen makes a key") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no private key; expected a file that kvrag keygen made") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: a key of another kind; expected Ed25519, as kvrag keygen makes it")
    return key


def public_line(key: Ed25519PrivateKey) -> str:
    """The public half of a key, as one line."""
    return line_of(key.public_key().public_bytes_raw())


def line_of(raw: bytes) -> str:
    """A public key of 32 bytes as one line."""
    return _PREFIX + base64.b64encode(raw).decode()


def public_key(text: str) -> bytes:
    """The 32 bytes of a public key, given as its line or as the name of a file with it.

    Raises:
        InputError: neither.
    """
    line = text.strip()
    if not line.startswith(_PREFIX):
        try:
            line = Path(text).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"{text}: neither a public key ({_PREFIX}...) nor a file with one") from error
    try:
        raw = base64.b64decode(line.removeprefix(_PREFIX), validate=True)
    except ValueError as error:
        raise InputError(f"{text}: not a public key; expected {_PREFIX} and 44 characters") from error
    if not line.startswith(_PREFIX) or len(raw) != _KEY_BYTES:
        raise InputError(f"{text}: not a public key; expected {_PREFIX} and 44 characters")
    return raw


def sign(key: Ed25519PrivateKey, digest: bytes) -> bytes:
    """The signature, 64 bytes, of the SHA-256 digest of a file's list of members."""
    return key.sign(_PURPOSE + digest)


def is_signed_by(public: bytes, signature: bytes, digest: bytes) -> bool:
    """Whether the holder of a key has signed this digest.

    Raises:
        MissingExtra: cryptography is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("cryptography", "encrypt") from error
    if len(signature) != _SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _PURPOSE + digest)
    except InvalidSignature:
        return False
    return True


def fingerprint(public: bytes) -> str:
    """A key in 16 hex digits, for people to compare."""
    return hashlib.sha256(public).hexdigest()[:16]
