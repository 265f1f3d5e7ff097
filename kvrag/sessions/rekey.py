"""Another key for saved conversations, or the first one; `kvrag.store.rekey` is for the rows of documents."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from kvrag.errors import ConfigError, SessionError, SessionSealed
from kvrag.sessions import container, file, logs
from kvrag.sessions.vault import SUFFIX, Vault
from kvrag.store.files import PARTIAL, commit, remove, try_lock, write_error, write_partial
from kvrag.store.sealing import MasterKey
from kvrag.stores import KEY_VERSION


def rekey_sessions(folder: str | Path, old: bytes | None, new: bytes | None) -> int:
    """Encrypt all saved conversations of a folder under a new key, all tenants'; how many there were.

    Each of them is under the old key or under the new one whenever it is interrupted; run again with the same
    keys it goes on where it was. What is damaged stays as it is.

    Args:
        folder: what `Engine.sessions` was given, or `sessions` in the folder of `kvrag chat`.
        old: the key that they are encrypted with; None: they are not.
        new: the key that they are to be encrypted with; None: none.

    Raises:
        ConfigError: both keys are the same.
        SessionError: a process has the folder, or one of the conversations.
        SessionSealed: one is encrypted with a third key.
        StoreWriteError: a file cannot be written.
    """
    if old == new:
        raise ConfigError("the new key is the old one")
    before, after = ((None if raw is None else MasterKey(raw, KEY_VERSION)) for raw in (old, new))
    done = 0
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            label = str(container.heading(path)[0].get("tenant", ""))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        done += _renewed(path, Vault(before, label), Vault(after, label))
    return done


def _renewed(path: Path, before: Vault, after: Vault) -> bool:
    """Encrypt one anew; False if it is so already, or damaged."""
    with ExitStack() as held:
        for lock in (before.lock(path.parent), path.with_suffix(".lock")):
            descriptor = try_lock(lock)
            if descriptor is None:
                raise SessionError(f"another process has the session at {path}; close it first")
            held.callback(os.close, descriptor)
            held.callback(remove, path.with_suffix(".lock"))
        try:
            container.claimed(path, after)
        except (SessionSealed, ValueError, KeyError, TypeError):
            pass
        else:
            return False
        try:
            saved = file.read(path, before)
        except SessionSealed:
            raise
        except SessionError:  # damaged
            return False
        _write(path, saved, after)
        return True


def _write(path: Path, saved: file.Saved, vault: Vault) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        log = None if saved.log is None else logs.write(path, saved.log, vault)
        manifest = {**saved.manifest, "log": log and asdict(log)}
        write_partial(partial, container.encoded(saved.tensors, manifest, vault))
        commit(partial, path)
    except OSError as error:
        raise write_error(error, path) from error
    logs.tidy(path, log)
