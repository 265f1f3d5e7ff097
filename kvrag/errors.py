"""Every error that kvrag raises on purpose.

* KVRagError
  * ConfigError (ValueError)            a setting that cannot work
  * InputError (ValueError)             a text, prompt or file that cannot be used as given
    * EmptyDocument                     nothing to encode
    * DocumentTooLong                   more tokens than the model's window holds
    * ContextOverflow                   prompt plus answer exceed the model's window
  * UnsupportedModel (ValueError)       the model cannot be composed exactly; the message says why
  * StoreError
    * CacheMiss (KeyError)              no usable entry under this key
    * StoreWriteError (OSError)         the entry could not be written (read-only, full, no permission)
      * UploadsPending                  what would have to go for it has not been uploaded yet
      * EntryTooLarge                   the entry alone is larger than a budget
  * CorpusError
    * CorpusLocked                      another process is writing to this corpus
    * DuplicateDocument (ValueError)    an id that already exists, or twice in one call
    * DocumentNotFound (KeyError)       an id that does not exist
  * SessionError                        a conversation that cannot go on: deleted, or of another model
    * SessionDamaged                    a file that is not, or not wholly, a saved session
    * SessionSealed                     a saved session that another key opens, or another tenant
  * GenerationCancelled                 the caller stopped the answer
  * EngineClosed (RuntimeError)         the engine was shut down
  * MissingExtra (ImportError)          an optional dependency is not installed; the message names the extra

Catch `KVRagError` for all of them, a leaf for one, or the Python class in parentheses.
"""

from __future__ import annotations


class KVRagError(Exception):
    """Root of every error that kvrag raises on purpose."""


class ConfigError(KVRagError, ValueError):
    """A setting that cannot work; the message names the setting, its value and what would work."""


class InputError(KVRagError, ValueError):
    """A text, prompt or file that cannot be used as given."""


class EmptyDocument(InputError):
    """A document without a single token."""


class DocumentTooLong(InputError):
    """A document with more tokens than the model's window holds behind the prefix."""


class ContextOverflow(InputError):
    """Prompt and requested answer together exceed the model's window."""


class UnsupportedModel(KVRagError, ValueError):
    """The model's documents cannot be re-positioned exactly; the message says what stands in the way."""


class StoreError(KVRagError):
    """Something about the store of prebuilt caches."""


class CacheMiss(StoreError, KeyError):
    """No usable entry under this key: absent, or damaged and therefore set aside."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class StoreWriteError(StoreError, OSError):
    """An entry could not be written; nothing that was there before is lost."""


class UploadsPending(StoreWriteError):
    """An entry does not fit yet: what would have to go for it has not been uploaded."""


class EntryTooLarge(StoreWriteError):
    """An entry that alone is larger than a budget: it never fits."""


class CorpusError(KVRagError):
    """Something about a collection of documents and its caches."""


class CorpusLocked(CorpusError):
    """Another process is writing to this corpus."""


class DuplicateDocument(CorpusError, ValueError):
    """An id that the corpus already holds, or that stands twice in one call."""


class DocumentNotFound(CorpusError, KeyError):
    """An id that the corpus does not hold."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class SessionError(KVRagError):
    """A conversation that cannot go on: it was deleted, or saved with another model."""


class SessionDamaged(SessionError):
    """A file that is not, or not wholly, a saved session."""


class SessionSealed(SessionError):
    """A saved session that the key or the tenant at hand does not open; nothing of it is lost."""


class GenerationCancelled(KVRagError):
    """The caller stopped the answer before it was complete."""


class EngineClosed(KVRagError, RuntimeError):
    """The engine was shut down; create a new one."""


class MissingExtra(KVRagError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing package and the extra that brings it."""
        super().__init__(f"{package} is not installed; run: pip install 'kvrag[{extra}]'")
