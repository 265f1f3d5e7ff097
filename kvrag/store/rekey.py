"""Another master key for an encrypted store: every blob decrypted and encrypted anew, in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvrag.errors import ConfigError
from kvrag.store import layout
from kvrag.store.damage import Damaged
from kvrag.store.files import write_error
from kvrag.store.filters import Filters, Note, read_note, write_note
from kvrag.store.folder import EntryFolder
from kvrag.store.resealing import recast


def rekey(
    path: str | Path, old: bytes, new: bytes, *, progress: Callable[[int], object] | None = None
) -> int:
    """Encrypt all entries of a store under a new key; the number of entries that were.

    It holds the store's lock all the time. Interrupted, it leaves a store that nobody can read until it is
    run again with the same keys, and goes on where it was. Entries that are damaged stay as they are, for
    `check` to find. What quarantine has under the old key is removed.

    Args:
        path: the store's folder.
        old: the key it is encrypted with.
        new: the key it is to be encrypted with.
        progress: called with the number of entries so far.

    Raises:
        ConfigError: the store is not encrypted, or with another key than `old`.
        StoreWriteError: a file cannot be written; run it again.
    """
    folder, before, after = EntryFolder(Path(path), Filters()), Filters(key=old), Filters(key=new)
    note = read_note(folder.path)
    if before.key is None or after.key is None or note is None:
        raise ConfigError(f"the store at {path} is not encrypted; there is no key to change")
    if (note.key_id, note.previous) not in ((before.key.id, ""), (after.key.id, before.key.id)):
        raise ConfigError(
            f"the store at {path} is encrypted with the key {note.key_id[:8]}, given was {before.key.id[:8]}"
        )
    if before.key.id == after.key.id:
        raise ConfigError("the new key is the old one")
    try:
        with folder.exclusive():
            write_note(folder.path, Note(after.key.id, before.key.id))
            done = 0
            for key_id in list(folder.ids()):
                done += _renew(folder, key_id, before, after)
                if progress is not None:
                    progress(done)
            folder.empty_quarantine(keep=0)
            write_note(folder.path, Note(after.key.id))
    except OSError as error:
        raise write_error(error, folder.path) from error
    return done


def _renew(folder: EntryFolder, key_id: str, before: Filters, after: Filters) -> bool:
    """Encrypt one entry anew; false if it is so already, or cannot be read."""
    try:
        manifest = folder.manifest(key_id)
        if after.key is None or after.key.is_called(manifest.key_id):
            return False
        data = layout.map_file(folder.files(key_id)[1], manifest)
        manifest, parts = recast(data, manifest, before, after)
    except Damaged:
        return False
    with folder.writing([(key_id, manifest, parts)]) as commit:
        commit([key_id])
    return True
